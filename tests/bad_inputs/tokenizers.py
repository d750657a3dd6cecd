"""Broken tokenizers and chat templates."""

from __future__ import annotations

import json
from typing import Any

from bad_inputs.case import Case, Change, directory, edit, link, mode, nested, of_json, pipe, remove, socket, write

TOKENIZER, CONFIG = "model/tokenizer.json", "model/tokenizer_config.json"
TEMPLATE = "model/chat_template.jinja"


def template(says: str, text: bytes | str, **settings: str) -> Case:
    """The model's chat template is ``text``."""
    return Case(says, (write(TEMPLATE, text),), settings)


def pairs(says: str, value: Any) -> Case:
    """A template in PaddleNLP's form."""
    text = value if isinstance(value, (str, bytes)) else json.dumps(value)
    return Case(says, (write("pairs.json", text),), {"chat_template": "pairs.json"})


def inside(**values: Any) -> Change:
    """tokenizer.json has these values."""
    return edit(TOKENIZER, lambda old: json.dumps({**json.loads(old), **values}).encode())


GOOD = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


def _with_token(old: bytes) -> bytes:
    found = json.loads(old)
    found["added_tokens"].append({**found["added_tokens"][-1], "id": 320, "content": "<x>"})
    return json.dumps(found).encode()


CASES = {
    # --- tokenizer.json
    "not there": Case("model has no tokenizer.json", (remove(TOKENIZER),)),
    "a folder": Case("model/tokenizer.json is no file that can be read, but a folder", (directory(TOKENIZER),)),
    "a named pipe": Case("model/tokenizer.json is no file that can be read, but a named pipe", (pipe(TOKENIZER),)),
    "a socket": Case("model/tokenizer.json is no file that can be read, but a socket", (socket(TOKENIZER),)),
    "a link to zeros without end": Case(
        "model/tokenizer.json is a link that leads out of its folder, to /dev/zero", (link(TOKENIZER, "/dev/zero"),)
    ),
    "no permission": Case("model/tokenizer.json cannot be read", (mode(TOKENIZER, 0),)),
    "empty": Case("model/tokenizer.json cannot be read by the tokenizers library", (write(TOKENIZER, ""),)),
    "an empty object": Case("model/tokenizer.json cannot be read by the tokenizers library", (write(TOKENIZER, "{}"),)),
    "a list": Case("model/tokenizer.json cannot be read by the tokenizers library", (write(TOKENIZER, "[1]"),)),
    "not UTF-8": Case("model/tokenizer.json cannot be read by the tokenizers library", (write(TOKENIZER, b"\xff"),)),
    "nested 100,000 deep": Case(
        "model/tokenizer.json cannot be read by the tokenizers library", (write(TOKENIZER, nested()),)
    ),
    "cut off": Case(
        "model/tokenizer.json cannot be read by the tokenizers library",
        (edit(TOKENIZER, lambda old: old[: len(old) // 2]),),
    ),
    "no model": Case("model/tokenizer.json cannot be read by the tokenizers library", (inside(model=None),)),
    "a model of an unknown kind": Case(
        "model/tokenizer.json cannot be read by the tokenizers library", (inside(model={"type": "Magic"}),)
    ),
    "a pre-tokenizer of an unknown kind": Case(
        "model/tokenizer.json cannot be read by the tokenizers library", (inside(pre_tokenizer={"type": "Magic"}),)
    ),
    "a broken expression": Case(
        "model/tokenizer.json cannot be read by the tokenizers library",
        (inside(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),),
    ),
    "another tokenizer not there": Case(
        "Model ./missing does not exist", settings={"tokenizer_name_or_path": "./missing"}
    ),
    "another tokenizer that is a file": Case(
        "Model data/train.json is not a directory", settings={"tokenizer_name_or_path": "data/train.json"}
    ),
    # --- tokenizer_config.json and its neighbours
    "config: cut off": Case("model/tokenizer_config.json is not valid JSON", (write(CONFIG, "{"),)),
    "config: a list": Case(
        "model/tokenizer_config.json must hold one JSON object, and holds a list", (write(CONFIG, "[1]"),)
    ),
    "config: text": Case(
        "model/tokenizer_config.json must hold one JSON object, and holds a str", (write(CONFIG, '"hello"'),)
    ),
    "config: not UTF-8": Case("model/tokenizer_config.json is not UTF-8 text", (write(CONFIG, b"\xff"),)),
    "config: nested 100,000 deep": Case("model/tokenizer_config.json is not valid JSON", (write(CONFIG, nested()),)),
    "config: no permission": Case("model/tokenizer_config.json cannot be read", (mode(CONFIG, 0),)),
    "config: a named pipe": Case(
        "model/tokenizer_config.json is no file that can be read, but a named pipe", (pipe(CONFIG),)
    ),
    "config: eos without content": Case(
        "model: tokenizer_config.json must give eos_token as text, or an object with its content, not {'id':",
        (of_json(CONFIG, eos_token={"id": 1}),),
    ),
    "config: eos a number": Case(
        "model: tokenizer_config.json must give eos_token as text, or an object with its content, not 7",
        (of_json(CONFIG, eos_token=7),),
    ),
    "config: eos unknown": Case(
        "model names no end-of-text token",
        (
            of_json(CONFIG, eos_token="<nowhere>"),
            remove("model/generation_config.json"),
            of_json("model/config.json", eos_token_id=...),
        ),
    ),
    "config: bos a list": Case(
        "model: tokenizer_config.json must give bos_token as text, or an object with its content, not ['<s>']",
        (of_json(CONFIG, bos_token=["<s>"]),),
    ),
    "special tokens: a list": Case(
        "model/special_tokens_map.json must hold one JSON object, and holds a list",
        (write("model/special_tokens_map.json", "[]"),),
    ),
    "eos id: 10**12": Case(
        "model: eos_token_id 1000000000000 of its config.json or generation_config.json is no token of this m",
        (of_json("model/config.json", eos_token_id=10**12), remove("model/generation_config.json")),
    ),
    "eos id: -1": Case(
        "model: eos_token_id -1 of its config.json or generation_config.json is no token of this model",
        (of_json("model/config.json", eos_token_id=-1), remove("model/generation_config.json")),
    ),
    "eos id: a word": Case(
        "model: eos_token_id 'end' of its config.json or generation_config.json is no token of this model",
        (of_json("model/config.json", eos_token_id="end"), remove("model/generation_config.json")),
    ),
    "eos ids: a list of words": Case(
        "model: eos_token_id 'end' of its config.json or generation_config.json is no token of this model",
        (of_json("model/generation_config.json", eos_token_id=["end"]),),
    ),
    "eos id: true": Case(
        "model: eos_token_id True of its config.json or generation_config.json is no token of this model",
        (of_json("model/generation_config.json", eos_token_id=True),),
    ),
    # --- chat templates: the file
    "template: not there": Case(
        "Chat template missing.jinja cannot be read", settings={"chat_template": "missing.jinja"}
    ),
    "template: empty": Case("chat_template t.jinja is empty", (write("t.jinja", " \n"),), {"chat_template": "t.jinja"}),
    "template: the model's is empty": template(
        "data/train.json, line 1: the chat template leaves this record's answer out, and writes '<|im_end|>'", ""
    ),
    "template: not UTF-8": template("Chat template model/chat_template.jinja is not UTF-8 text", b"\xff\xfe"),
    "template: a named pipe": Case(
        "model/chat_template.jinja is no file that can be read, but a named pipe", (pipe(TEMPLATE),)
    ),
    "template: a named pipe that is given": Case(
        "Chat template t.jinja is no file that can be read, but a named pipe",
        (pipe("t.jinja"),),
        {"chat_template": "t.jinja"},
    ),
    "template: zeros without end": Case(
        "Chat template /dev/zero is no file that can be read, but a device", settings={"chat_template": "/dev/zero"}
    ),
    "template: no permission": Case("model/chat_template.jinja cannot be read", (mode(TEMPLATE, 0),)),
    "template: in the config, a list without names": Case(
        "model/tokenizer_config.json must give chat_template as text, or a list of objects with name and temp",
        (remove(TEMPLATE), of_json(CONFIG, chat_template=["a"])),
    ),
    "template: in the config, a list without keys": Case(
        "model/tokenizer_config.json must give chat_template as text, or a list of objects with name and temp",
        (remove(TEMPLATE), of_json(CONFIG, chat_template=[{}])),
    ),
    "template: in the config, a list of numbers": Case(
        "model/tokenizer_config.json must give chat_template as text, or a list of objects with name and temp",
        (remove(TEMPLATE), of_json(CONFIG, chat_template=[{"name": "default", "template": 1}])),
    ),
    "template: in the config, a number": Case(
        "model/tokenizer_config.json must give chat_template as text, or a list of objects with name and temp",
        (remove(TEMPLATE), of_json(CONFIG, chat_template=1)),
    ),
    "template: in the config, an object": Case(
        "model/tokenizer_config.json must give chat_template as text, or a list of objects with name and temp",
        (remove(TEMPLATE), of_json(CONFIG, chat_template={"default": GOOD})),
    ),
    # --- chat templates: their text
    "template: not closed": template(
        "data/train.json, line 1: The chat template of model is not valid Jinja",
        "{% for m in messages %}{{ m.content }}",
    ),
    "template: an unknown tag": template(
        "data/train.json, line 1: The chat template of model is not valid Jinja", "{% magic %}"
    ),
    "template: an unknown name": template(
        "data/train.json, line 1: The chat template of model cannot write a conversation of user, assistant:",
        "{{ nobody.content }}",
    ),
    "template: an unknown filter": template(
        "data/train.json, line 1: The chat template of model is not valid Jinja", "{{ messages | magic }}"
    ),
    "template: refuses": template(
        "data/train.json, line 1: The chat template of model cannot write a conversation of user, assistant:",
        "{{ raise_exception('no') }}",
    ),
    "template: writes nothing": template(
        "data/train.json, line 1: the chat template leaves this record's answer out, and writes '<|im_end|>'",
        "{# nothing #}",
    ),
    "template: divides by nothing": template(
        "data/train.json, line 1: The chat template of model cannot write a conversation of user, assistant:",
        "{{ 1 / 0 }}" + GOOD,
    ),
    "template: includes a file": template(
        "data/train.json, line 1: The chat template of model cannot write a conversation of user, assistant:",
        "{% include '/etc/passwd' %}",
    ),
    "template: reaches for a class": template(
        "data/train.json, line 1: The chat template of model cannot write a conversation of user, assistant:",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + GOOD,
    ),
    "template: loses the answer": template(
        "data/train.json, line 1: the chat template leaves this record's answer out, and writes '' in its pla",
        "{{ messages[0].content }}<|im_end|>",
    ),
    "template: loses the answer's text": template(
        "data/train.json, line 1: the chat template leaves this record's answer out, and writes 'assistant<|i",
        "{% for m in messages %}{{ m.role }}{% if m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}",
    ),
    "template: loses the answer in a block": template(
        "data/train.json, line 1: the chat template leaves this record's answer out, and writes 'yes' in its",
        "{{ messages[0].content }}{% generation %}yes{% endgeneration %}",
    ),
    "template: empty blocks": template(
        "data/train.json, line 1: The chat template of model puts no text into its generation blocks for a co",
        GOOD + "{% generation %}{% endgeneration %}",
    ),
    "template: another text than it gives to be answered": template(
        "data/train.json, line 1: The chat template of model writes an answer into another text than the one",
        "{% if add_generation_prompt %}A{% else %}B{% endif %}" + GOOD,
    ),
    "template: 20 MB": template(
        "data/train.json, line 1: The chat template of model is not valid Jinja", "x" * 20_000_000 + GOOD
    ),
    "template: nested 10,000 deep": template(
        "data/train.json, line 1: The chat template of model is not valid Jinja",
        "{% if true %}" * 10_000 + GOOD + "{% endif %}" * 10_000,
    ),
    "template: an expression nested 10,000 deep": template(
        "data/train.json, line 1: The chat template of model is not valid Jinja",
        "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}" + GOOD,
    ),
    "template: a number of 10**9 digits": template(
        "data/train.json, line 1: The chat template of model cannot write a conversation of user, assistant:",
        "{{ 10 ** 1000000000 }}" + GOOD,
    ),
    "template: ranges within ranges": template(
        "data/train.json, line 1: The chat template of model cannot write a conversation of user, assistant:",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + GOOD,
    ),
    "template: half of a surrogate pair": template(
        "A text holds half of a surrogate pair, which is no text", "{{ '\\ud800' }}" + GOOD
    ),
    "template: 10**10 letters": template(
        "data/train.json, line 1: The chat template of model cannot write a conversation of user, assistant:",
        "{{ 'a' * 10000000000 }}" + GOOD,
    ),
    "template: a range of 10**9": template(
        "data/train.json, line 1: The chat template of model cannot write a conversation of user, assistant:",
        "{% for i in range(1000000000) %}x{% endfor %}" + GOOD,
    ),
    "template: a macro without end": template(
        "data/train.json, line 1: The chat template of model cannot write a conversation of user, assistant:",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + GOOD,
    ),
    "pairs: divides by nothing": pairs(
        "pairs.json cannot be used (division by zero)", {"conversation": ["{{user}}{{1/0}}", "{{bot}}"]}
    ),
    # --- PaddleNLP's pairs
    "pairs: cut off": pairs("Chat template pairs.json is not valid JSON", "{"),
    "pairs: a list": pairs("Chat template pairs.json: it holds list, not an object", []),
    "pairs: nested 100,000 deep": pairs("Chat template pairs.json is not valid JSON", nested()),
    "pairs: not UTF-8": pairs("Chat template pairs.json is not UTF-8 text", b"\xff"),
    "pairs: unknown keys": pairs("Chat template pairs.json: it has unknown keys", {"talk": []}),
    "pairs: a conversation of one": pairs(
        'Chat template pairs.json: "conversation" must be two texts, what the user says and what the bot answ',
        {"conversation": ["{{user}}"]},
    ),
    "pairs: a conversation of numbers": pairs(
        'Chat template pairs.json: "conversation" must be two texts, what the user says and what the bot answ',
        {"conversation": [1, 2]},
    ),
    "pairs: a system that is a number": pairs(
        'Chat template pairs.json: "system" must be text', {"conversation": ["{{user}}", "{{bot}}"], "system": 1}
    ),
    "pairs: not closed": pairs(
        "data/train.json, line 1: Chat template pairs.json cannot be used", {"conversation": ["{{user", "{{bot}}"]}
    ),
    "pairs: loses the answer": pairs(
        "data/train.json, line 1: the chat template leaves this record's answer out, and writes 'yes' in its",
        {"conversation": ["{{user}}", "yes"]},
    ),
    "generate: a broken template": Case(
        "The chat template of model is not valid Jinja",
        (write(TEMPLATE, "{% magic %}"),),
        typed=("generate", "--model_name_or_path", "model", "--prompt", "a"),
    ),
    "generate: a template that writes nothing": Case(
        "A prompt has no token: it is empty, and the chat template adds nothing to it",
        (write(TEMPLATE, "{# nothing #}"),),
        typed=("generate", "--model_name_or_path", "model", "--prompt", "a"),
    ),
    "evaluate: a template that asks nothing": Case(
        "A prompt has no token: it is empty, and the chat template adds nothing to it",
        (write(TEMPLATE, "{% if not add_generation_prompt %}{{ messages[-1].content }}<|im_end|>{% endif %}"),),
        typed=(
            *("evaluate", "--model_name_or_path", "model", "--dataset_name_or_path", "data/train.json"),
            *("--eval_with_do_generation", "true", "--max_new_tokens", "2"),
        ),
    ),
    "an added token beyond the model": Case(
        "A prompt has the token id 320, and the model's vocabulary has 320 tokens",
        (edit(TOKENIZER, _with_token),),
        typed=("generate", "--model_name_or_path", "model", "--prompt", "<x>", "--max_new_tokens", "2"),
    ),
}
