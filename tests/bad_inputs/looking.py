"""What ``sft data`` refuses."""

from __future__ import annotations

from bad_inputs.case import RECORD, Case, directory, link, mode, of_json, write

LOOK = ("data", "--model_name_or_path", "model", "--dataset_name_or_path", "data")

CASES = {
    "no model": Case("model_name_or_path is not set", typed=("data", "--dataset_name_or_path", "data")),
    "no data": Case("dataset_name_or_path is not set", typed=("data", "--model_name_or_path", "model")),
    "a setting that there is not": Case("no_such_setting", typed=(*LOOK, "--no_such_setting", "1")),
    "more records than are shown": Case("show: expected a number of records from 0", typed=(*LOOK, "--show", "1e9")),
    "a negative number of records": Case("show: expected a number of records from 0", typed=(*LOOK, "--show", "-1")),
    "digits of another script": Case("show: expected a number of records", typed=(*LOOK, "--show", "١٢")),
    "nothing to find": Case("find: expected a text to look for", typed=(*LOOK, "--find", "")),
    "the page is a folder": Case("html: model is a folder", typed=(*LOOK, "--html", "model")),
    "the page is the data": Case(
        "html: data/train.json is there, and is no page of sft data", typed=(*LOOK, "--html", "data/train.json")
    ),
    "the page is a device": Case("html: /dev/null is there", typed=(*LOOK, "--html", "/dev/null")),
    "the page in no folder": Case("html: no/page.html is in no folder", typed=(*LOOK, "--html", "no/page.html")),
    "the page is a link to the data": Case(
        "html: page.html is there", (link("page.html", "data/train.json"),), typed=(*LOOK, "--html", "page.html")
    ),
    "the page's folder is read only": Case(
        "html: shut/page.html is in no folder that can be written to",
        (directory("shut"), mode("shut", 0o500)),
        typed=(*LOOK, "--html", "shut/page.html"),
    ),
    "a name that no page can have": Case("html", typed=(*LOOK, "--html", "a" * 300)),
    "two settings files": Case("Unexpected 'b.json'", typed=(*LOOK, "a.json", "b.json")),
    "a settings file that is not there": Case("nowhere.json", typed=("data", "nowhere.json")),
    "a broken record": Case("data/train.json, line 2", (write("data/train.json", RECORD + "{"),), typed=LOOK),
    "a record without an answer": Case(
        'data/train.json, line 2: the record has no "tgt"',
        (write("data/train.json", RECORD + '{"src": "a"}'),),
        typed=LOOK,
    ),
    "an empty file": Case("data/train.json is empty", (write("data/train.json", ""),), typed=LOOK),
    "nothing is left to learn": Case(
        "No train record keeps a target", typed=(*LOOK, "--max_length", "4", "--truncation", "drop")
    ),
    "too many bad records": Case(
        "2 of 21 records of the train data cannot be read",
        (write("data/train.json", RECORD * 19 + "{\n{\n"),),
        typed=(*LOOK, "--on_bad_record", "skip"),
    ),
    "a tokenizer of another model": Case(
        "they do not belong together", (of_json("model/config.json", vocab_size=8),), typed=LOOK
    ),
    "a template that is none": Case(
        "chat_template", (write("template.jinja", "{% if %}"),), typed=(*LOOK, "--chat_template", "template.jinja")
    ),
    "nothing to train on and nothing to measure": Case(
        "do_train is false, and data has no dev data to look at", typed=(*LOOK, "--do_train", "false")
    ),
}
