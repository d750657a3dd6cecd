"""Broken data: files, lines, records, tables."""

from __future__ import annotations

import gzip
import json

from bad_inputs.case import RECORD, Case, Change, directory, edit, link, mode, nested, pipe, remove, write

TRAIN = "data/train.json"


def third(line: bytes | str) -> tuple[Change]:
    """Line 3 of the training data is ``line``."""
    text = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
    return (write(TRAIN, RECORD.encode() * 2 + text + b"\n" + RECORD.encode()),)


def record(**values: object) -> tuple[Change]:
    """The record on line 3 has these values."""
    return third(json.dumps(values))


def message(**values: object) -> tuple[Change]:
    """The record is a conversation whose second message is this."""
    return (write(TRAIN, json.dumps({"messages": [{"role": "user", "content": "a"}, values]})),)


def other(name: str, content: bytes | str) -> tuple[Change, ...]:
    """The training data is a file of another name."""
    return (remove(TRAIN), write(f"data/{name}", content))


def conversation(turns: int) -> str:
    return json.dumps({"src": ["How are you?"] * turns, "tgt": ["Well."] * turns}) + "\n"


CASES = {
    # --- the file
    "not there": Case("data has no training data", (remove(TRAIN),)),
    "folder not there": Case("Data missing does not exist", settings={"dataset_name_or_path": "missing"}),
    "empty": Case("data/train.json is empty", (write(TRAIN, ""),)),
    "white space alone": Case("data/train.json is empty", (write(TRAIN, " \n\t\n\n"),)),
    "a byte order mark alone": Case("data/train.json is empty", (write(TRAIN, b"\xef\xbb\xbf"),)),
    "an empty array": Case("data/train.json is empty", (write(TRAIN, "[]"),)),
    "a folder of that name": Case("data has no training data", (remove(TRAIN), directory(TRAIN))),
    "a named pipe": Case("data has no training data", (pipe(TRAIN),)),
    "a named pipe, named itself": Case(
        "data/train.json has no training data", (pipe(TRAIN),), {"dataset_name_or_path": TRAIN}
    ),
    "zeros without end": Case("/dev/zero has no training data", settings={"dataset_name_or_path": "/dev/zero"}),
    "a link to zeros without end": Case("data has no training data", (link(TRAIN, "/dev/zero"),)),
    "a link to itself": Case("data has no training data", (link(TRAIN, "train.json"),)),
    "no permission": Case("data/train.json cannot be read", (mode(TRAIN, 0),)),
    "no permission for the folder": Case("data cannot be read", (mode("data", 0),)),
    "two of one split": Case("data/train.json and train.jsonl both exist", (write("data/train.jsonl", RECORD),)),
    "two kinds in one folder": Case(
        "data/train/a.json and b.csv are files of different kinds",
        (remove(TRAIN), write("data/train/a.json", RECORD), write("data/train/b.csv", "src,tgt\na,b\n")),
    ),
    "gzip": Case("data/train.json, line 1 is not UTF-8 text", (write(TRAIN, gzip.compress(RECORD.encode(), mtime=0)),)),
    "zeros": Case("data/train.json, line 1 is not JSON", (write(TRAIN, bytes(1000)),)),
    "one line of 50 MB": Case(
        "data/train.json, line 3: the record has 50,000,001 characters, and at most 4,000,000 are read",
        third('{"src": "' + "word " * 10_000_000 + '", "tgt": "b"}'),
        seconds=30,
    ),
    "one answer of 50 MB": Case(
        "data/train.json, line 3: the record has 50,000,001 characters, and at most 4,000,000 are read",
        third('{"src": "a", "tgt": "' + "x" * 50_000_000 + '"}'),
        seconds=30,
    ),
    "a line of 100 MB without end": Case(
        "data/train.json, line 3 is not JSON", third(b'{"src": "' + b"a" * 100_000_000), seconds=30
    ),
    "an array of 50 MB with one record": Case(
        "data/train.json, line 1", (write(TRAIN, '[{"src": "' + "word " * 10_000_000 + '", "tgt": "b"}]'),), seconds=30
    ),
    # --- its text
    "not UTF-8": Case("data/train.json, line 3 is not UTF-8 text", third(b'{"src": "\xff\xfe", "tgt": "b"}')),
    "UTF-16": Case("data/train.json, line 1 is not UTF-8 text", (write(TRAIN, RECORD.encode("utf-16")),)),
    "half a character at the end": Case(
        "data/train.json, line 21 is not UTF-8 text", (edit(TRAIN, lambda old: old + b'{"src": "\xe6\xb2'),)
    ),
    "half of a surrogate pair": Case(
        'data/train.json, line 3: "src" holds half of a surrogate pair, which is no text',
        third('{"src": "\\ud83d", "tgt": "b"}'),
    ),
    "half of a surrogate pair in the answer": Case(
        'data/train.json, line 3: "tgt" holds half of a surrogate pair, which is no text',
        third('{"src": "a", "tgt": "b\\udc00"}'),
    ),
    "an encoded surrogate": Case(
        "data/train.json, line 3 is not UTF-8 text", third(b'{"src": "\xed\xa0\xbd", "tgt": "b"}')
    ),
    # --- its JSON
    "cut off": Case("data/train.json, line 3 is not JSON", third('{"src": "a"')),
    "a comma too many": Case("data/train.json, line 3 is not JSON", third('{"src": "a", "tgt": "b",}')),
    "single quotes": Case("data/train.json, line 3 is not JSON", third("{'src': 'a', 'tgt': 'b'}")),
    "two objects on a line": Case(
        "data/train.json, line 3 is not JSON", third('{"src": "a", "tgt": "b"} {"src": "a", "tgt": "b"}')
    ),
    "an object over two lines": Case("data/train.json, line 3 is not JSON", third('{"src": "a",\n"tgt": "b"}')),
    "a bare word": Case("data/train.json, line 3 is not JSON", third("hello")),
    "NaN in a record": Case(
        'data/train.json, line 3: "src" must be text or a list of texts, not nan', third('{"src": NaN, "tgt": "b"}')
    ),
    "a control character in a text": Case(
        "data/train.json, line 3 is not JSON", third('{"src": "a\x00b", "tgt": "b"}')
    ),
    "lists nested 100,000 deep": Case(
        "data/train.json, line 3 cannot be read as JSON", third(f'{{"src": "a", "tgt": {nested()}}}')
    ),
    "objects nested 100,000 deep": Case(
        "data/train.json, line 3 cannot be read as JSON", third('{"a":' * 100_000 + "1" + "}" * 100_000)
    ),
    "nested 100,000 deep and cut off": Case("data/train.json, line 3 cannot be read as JSON", third("[" * 100_000)),
    "an array nested 100,000 deep": Case("data/train.json, line 1", (write(TRAIN, "[" + nested() + "]"),)),
    "a number of 5,000 digits": Case(
        "data/train.json, line 3 cannot be read as JSON", third('{"src": "a", "tgt": ' + "9" * 5000 + "}")
    ),
    "a number of 5,000 digits in an array": Case("data/train.json, line 1", (write(TRAIN, "[" + "9" * 5000 + "]"),)),
    "a key twice": Case(
        "data/train.json, line 3 cannot be read as JSON", third('{"src": "a", "tgt": "b", "src": "c"}')
    ),
    "a key twice in an array": Case(
        "data/train.json, line 1", (write(TRAIN, '[{"src": "a", "tgt": "b", "tgt": "c"}]'),)
    ),
    "a key twice within": Case(
        "data/train.json, line 3 cannot be read as JSON",
        third('{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}'),
    ),
    "a broken array": Case("data/train.json, line 1", (write(TRAIN, '[{"src": "a", "tgt": "b"} {"src": '),)),
    "an array that does not end": Case("data/train.json, line 1", (write(TRAIN, '[{"src": "a", "tgt": "b"}, '),)),
    "text after the array": Case(
        "data/train.json, line 2 is not JSON", (write(TRAIN, '[{"src": "a", "tgt": "b"}]\nmore'),)
    ),
    "an array of arrays": Case("data/train.json, line 1", (write(TRAIN, '[["a", "b"]]'),)),
    "a list on a line": Case(
        'data/train.json, line 3 holds list, not a JSON object like {"src": …}', third('["a", "b"]')
    ),
    "a number on a line": Case('data/train.json, line 3 holds int, not a JSON object like {"src": …}', third("17")),
    "null on a line": Case('data/train.json, line 3 holds NoneType, not a JSON object like {"src": …}', third("null")),
    # --- its records
    "no answer": Case('data/train.json, line 3: the record has no "tgt"', record(src="a")),
    "no question": Case('data/train.json, line 3: the record has no "src"', record(tgt="a")),
    "an empty answer": Case('data/train.json, line 3: "tgt" is empty', record(src="a", tgt="  ")),
    "an empty record": Case("data/train.json, line 3: the record is in no known format", record()),
    "unknown keys": Case("data/train.json, line 3: the record is in no known format", record(question="a", answer="b")),
    "two formats at once": Case(
        "data/train.json, line 3: the record could be src/tgt or messages", record(src="a", tgt="b", messages=[])
    ),
    "another format than the first": Case(
        "data/train.json, line 3: this record is Alpaca", record(instruction="a", output="b")
    ),
    "a number for a question": Case(
        'data/train.json, line 3: "src" must be text or a list of texts, not 17', record(src=17, tgt="b")
    ),
    "null for a question": Case(
        'data/train.json, line 3: "src" must be text or a list of texts, not None', record(src=None, tgt="b")
    ),
    "true for an answer": Case(
        'data/train.json, line 3: "tgt" must be text or a list of texts, not True', record(src="a", tgt=True)
    ),
    "an object for an answer": Case(
        "data/train.json, line 3: \"tgt\" must be text or a list of texts, not {'text': 'b'}",
        record(src="a", tgt={"text": "b"}),
    ),
    "more questions than answers": Case(
        'data/train.json, line 3: "src" and "tgt" must have as many turns; they have 2 and 1',
        record(src=["a", "b"], tgt=["c"]),
    ),
    "no turns": Case('data/train.json, line 3: "src" must be text or a list of texts, not []', record(src=[], tgt=[])),
    "a list within a list": Case(
        "data/train.json, line 3: \"src\" must be text or a list of texts, not [['a']]",
        record(src=[["a"]], tgt=[["b"]]),
    ),
    "a context of unknown names": Case(
        'data/train.json, line 3: "context" has city, and only "system" is known there',
        record(src="a", tgt="b", context={"city": "Rome"}),
    ),
    "a key of 100,000 letters": Case(
        "data/train.json, line 3: the record is in no known format", record(**{"k" * 100_000: 1})
    ),
    "messages that are text": Case(
        "data/train.json, line 1: \"messages\" must be a list of at least one message, not 'hello'",
        (write(TRAIN, '{"messages": "hello"}'),),
    ),
    "no message": Case(
        'data/train.json, line 1: "messages" must be a list of at least one message, not []',
        (write(TRAIN, '{"messages": []}'),),
    ),
    "a message that is text": Case(
        'data/train.json, line 1: message 1 of "messages" must be an object with role and content, not \'hello',
        (write(TRAIN, '{"messages": ["hello"]}'),),
    ),
    "a message without content": Case(
        'data/train.json, line 1: message 2 of "messages" has no "content"', message(role="assistant")
    ),
    "a message without role": Case(
        'data/train.json, line 1: message 2 of "messages" has no "role"', message(content="b")
    ),
    "an unknown role": Case(
        "data/train.json, line 1: message 2 of \"messages\" has the role 'robot'", message(role="robot", content="b")
    ),
    "a role that is a list": Case(
        "data/train.json, line 1: message 2 of \"messages\" has the role ['user']", message(role=["user"], content="b")
    ),
    "a user's message that is to be learned": Case(
        'data/train.json, line 1: message 2 of "messages" is to be learned ("train"), and its role is',
        message(role="user", content="b", train=True),
    ),
    "an answer that is excluded, and weighs": Case(
        'data/train.json, line 1: message 2 of "messages" has weights that contradict each other (weight, loss); keep',
        message(role="assistant", content="b", loss=False, weight=1),
    ),
    "an answer of which parts are excluded": Case(
        'data/train.json, line 1: message 2 of "messages" has "train_detail", which is for parts of a message',
        message(role="assistant", content="b", train_detail=[{"begin_offset": 0, "end_offset": 0, "train": False}]),
    ),
    "a weight in what is learned as one text": Case(
        "data/train.json, line 1: train_on everything learns a conversation as one text, and a message of this one has",
        message(role="assistant", content="b", weight=2),
        {"train_on": "everything"},
    ),
    "a negative weight": Case(
        'data/train.json, line 1: message 2 of "messages" has the weight -0.5',
        message(role="assistant", content="b", weight=-0.5),
    ),
    "a record that weighs less than nothing": Case(
        'data/train.json, line 3: the record has the weight -1; "weight" must be 0, or a number from 0.000001 to 1,0',
        third('{"src": "a", "tgt": "b", "weight": -1}'),
    ),
    "a record that weighs NaN": Case(
        "data/train.json, line 3: the record has the weight nan", third('{"src": "a", "tgt": "b", "weight": NaN}')
    ),
    "a record that weighs too much": Case(
        "data/train.json, line 3: the record has the weight 1e+30", third('{"src": "a", "tgt": "b", "weight": 1e30}')
    ),
    "a record that weighs a word": Case(
        "data/train.json, line 3: the record has the weight 'heavy'",
        third('{"src": "a", "tgt": "b", "weight": "heavy"}'),
    ),
    "a record that weighs nothing": Case(
        "data/train.json, line 3: the record has the weight 0, so nothing can be learned from it; take it out",
        third('{"src": "a", "tgt": "b", "weight": 0}'),
    ),
    "no answer among the messages": Case(
        "data/train.json, line 1: no turn of this record is a target, so nothing can be learned from it",
        message(role="user", content="b"),
    ),
    "no answer to learn": Case(
        "data/train.json, line 1: no turn of this record is a target, so nothing can be learned from it",
        message(role="assistant", content="b", weight=0),
    ),
    "an answer to nothing": Case(
        'data/train.json, line 1: "messages" begins with an answer to nothing',
        (write(TRAIN, '{"messages": [{"role": "assistant", "content": "a"}]}'),),
    ),
    "a picture": Case(
        "data/train.json, line 1: message 2 of \"messages\" has a part of the type 'image_url', and a model reads",
        message(role="assistant", content=[{"type": "text", "text": "b"}, {"type": "image_url"}]),
    ),
    "parts without a type": Case(
        'data/train.json, line 1: message 2 of "messages" must be text, or a list of parts like',
        message(role="assistant", content=["b"]),
    ),
    "tools that are no JSON": Case(
        'data/train.json, line 1: "tools" is not valid JSON (Expecting value: line 1 column 1 (char 0)); correct it.',
        (write(TRAIN, '{"messages": [{"role": "user", "content": "a"}], "tools": "see above"}'),),
    ),
    "tools without names": Case(
        'data/train.json, line 1: tool 1 of "tools" must be an object with "name", or one with such a "function"',
        (write(TRAIN, '{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}'),),
    ),
    "tools that the template does not write": Case(
        "data/train.json, line 1: The chat template of model does not write the tools of a record, so the model",
        (
            write(
                TRAIN,
                '{"tools": [{"name": "f"}], "messages": [{"role": "user", "content": "a"}, '
                '{"role": "assistant", "content": "b"}]}',
            ),
        ),
    ),
    "a call without a name": Case(
        'data/train.json, line 1: "tool_calls" of message 2 of "messages" must be an object with "name" and "argum',
        message(role="assistant", content="b", tool_calls=[{"id": 1}]),
    ),
    "arguments that are a list": Case(
        'data/train.json, line 1: "arguments" of "tool_calls" of message 2 of "messages" must be a JSON object, not',
        message(role="assistant", tool_calls=[{"name": "f", "arguments": "[1]"}]),
    ),
    "arguments nested without end": Case(
        'data/train.json, line 1: "arguments" of "tool_calls" of message 2 of "messages" is not valid JSON (it is nes',
        message(role="assistant", tool_calls=[{"name": "f", "arguments": "[" * 100_000}]),
    ),
    "a call that the template does not write": Case(
        "data/train.json, line 1: The chat template of model does not write calls; give chat_template one that does",
        message(role="assistant", tool_calls=[{"name": "f", "arguments": {"x": 1}}]),
    ),
    "a call of the user": Case(
        "data/train.json, line 1: message 2 of \"messages\" has calls, and its role is 'user'; only an assistant's",
        message(role="user", content="b", tool_calls=[{"name": "f", "arguments": {}}]),
    ),
    "a thought that is no text": Case(
        'data/train.json, line 1: "reasoning_content" of message 2 of "messages" must be text, not [1]',
        message(role="assistant", content="b", reasoning_content=[1]),
    ),
    "train_on everything without thoughts": Case(
        "train_on everything learns thoughts too; leave train_on_thoughts out",
        settings={"train_on": "everything", "train_on_thoughts": "none"},
    ),
    "enable_thinking that the template does not know": Case(
        "The chat template (model/chat_template.jinja) writes the same whether enable_thinking is true or false",
        settings={"enable_thinking": "true"},
    ),
    "a history that is text": Case(
        "data/train.json, line 1: \"history\" must be a list of [question, answer], not 'c'",
        (write(TRAIN, '{"instruction": "a", "output": "b", "history": "c"}'),),
    ),
    "a history of triples": Case(
        "data/train.json, line 1: \"history\" must be a list of [question, answer], not [['c', 'd', 'e']]",
        (write(TRAIN, '{"instruction": "a", "output": "b", "history": [["c", "d", "e"]]}'),),
    ),
    "ShareGPT with an unknown speaker": Case(
        "data/train.json, line 1: message 1 of \"conversations\" has the role 'bing'",
        (write(TRAIN, '{"conversations": [{"from": "bing", "value": "a"}]}'),),
    ),
    "longer than the model reads": Case(
        "A record has 218 tokens and model reads at most 65, the last of which is only predicted",
        record(src="river " * 50, tgt="b"),
    ),
    "a CSV file without rows": Case("data/train.csv is empty", other("train.csv", "src,tgt\n")),
    "an empty CSV file": Case("data/train.csv is empty", other("train.csv", "")),
    "a CSV row with a cell too many": Case(
        "data/train.csv, line 3 has 3 cells and the header 2", other("train.csv", "src,tgt\na,b\na,b,c\n")
    ),
    "a CSV row with a cell too few": Case(
        "data/train.csv, line 3 has 1 cells and the header 2", other("train.csv", "src,tgt\na,b\na\n")
    ),
    "a CSV name twice": Case(
        "data/train.csv, line 1 names the column 'src' twice", other("train.csv", "src,src\na,b\n")
    ),
    "a CSV file that is not UTF-8": Case(
        "data/train.csv, line 2 is not UTF-8 text", other("train.csv", b"src,tgt\na,\xff\n")
    ),
    "a CSV quote that never ends": Case(
        "data/train.csv, line 2 is not CSV", other("train.csv", 'src,tgt\na,"b\n' + "c,d\n" * 50_000)
    ),
    "a CSV file of other columns": Case(
        "data/train.csv, line 2: the record is in no known format", other("train.csv", "question,answer\na,b\n")
    ),
    "a parquet file that is none": Case(
        "data/train.parquet, row 1 cannot be read as parquet", other("train.parquet", "hello")
    ),
    "a parquet file cut off": Case(
        "data/train.parquet, row 1 cannot be read as parquet",
        other("train.parquet", b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1"),
    ),
    "an empty parquet file": Case("data/train.parquet, row 1 cannot be read as parquet", other("train.parquet", b"")),
    # --- the dev data
    "a broken record of the dev data": Case(
        "data/dev.json, line 2: the record is in no known format", (write("data/dev.json", RECORD + "{}\n"),)
    ),
    "empty dev data": Case("data/dev.json is empty", (write("data/dev.json", ""),)),
    "two kinds of dev data": Case(
        "data/dev.json and dev.csv both exist",
        (write("data/dev.json", RECORD), write("data/dev.csv", "src,tgt\na,b\n")),
    ),
    "evaluation without dev data": Case(
        "Evaluation is asked for, and data has no dev data in use", settings={"evaluation_strategy": "epoch"}
    ),
    # --- streams
    "a broken record in a stream": Case(
        'data/train.json, line 3: the record has no "tgt"', record(src="a"), {"lazy": "true"}
    ),
    "an empty stream": Case("data/train.json is empty", (write(TRAIN, "\n"),), {"lazy": "true"}),
    "a stream that is not UTF-8": Case("data/train.json, line 3 is not UTF-8 text", third(b"\xff"), {"lazy": "true"}),
    "a stream nested 100,000 deep": Case(
        "data/train.json, line 3 cannot be read as JSON", third("[" * 100_000), {"lazy": "true"}
    ),
    "a line of 50 MB in a stream": Case(
        "data/train.json, line 3: the record has 50,000,001 characters, and at most 4,000,000 are read",
        third('{"src": "' + "word " * 10_000_000 + '", "tgt": "b"}'),
        {"lazy": "true"},
        seconds=30,
    ),
    "a broken record in two processes": Case(
        'data/train.json, line 3: the record has no "tgt"', record(src="a"), {"dataset_num_proc": "2"}
    ),
    # --- other commands
    "evaluate: data not there": Case(
        "Data missing does not exist",
        typed=("evaluate", "--model_name_or_path", "model", "--dataset_name_or_path", "missing"),
    ),
    "evaluate: a broken record": Case(
        'data/train.json, line 3: the record has no "tgt"',
        record(src="a"),
        typed=("evaluate", "--model_name_or_path", "model", "--dataset_name_or_path", TRAIN),
    ),
    "generate: a broken record": Case(
        "data/train.json, line 3 is not JSON",
        third("{"),
        typed=("generate", "--model_name_or_path", "model", "--prompts_file", TRAIN),
    ),
    "generate: prompts that are not UTF-8": Case(
        "prompts.txt is not UTF-8 text",
        (write("prompts.txt", b"a\n\xff\n"),),
        typed=("generate", "--model_name_or_path", "model", "--prompts_file", "prompts.txt"),
    ),
    "generate: a folder of prompts": Case(
        "data is no file that can be read, but a folder",
        typed=("generate", "--model_name_or_path", "model", "--prompts_file", "data"),
    ),
    "generate: prompts without end": Case(
        "/dev/zero is no file that can be read, but a device",
        typed=("generate", "--model_name_or_path", "model", "--prompts_file", "/dev/zero"),
    ),
    "generate: standard input that is not UTF-8": Case(
        "Standard input, line 2 is not UTF-8 text",
        typed=("generate", "--model_name_or_path", "model"),
        stdin=b"hello\n\xff\xfe\n",
    ),
    "generate: no prompt": Case(
        "Standard input has no prompt", typed=("generate", "--model_name_or_path", "model"), stdin=b"\n  \n"
    ),
    "chat: standard input that is not UTF-8": Case(
        "Standard input, line 1 is not UTF-8 text",
        typed=("chat", "--model_name_or_path", "model", "--max_new_tokens", "1"),
        stdin=b"\xff\xfe\n",
    ),
}
