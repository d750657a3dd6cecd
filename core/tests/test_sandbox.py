"""Templates of strangers end, in one sentence, whatever they do; those of published models do not notice."""

from __future__ import annotations

import datetime
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import sft
from sft.conversations import Turn
from sft.data.jinja_template import JinjaTemplate
from sft.data.sandbox import Sandbox
from sft.data.sandbox_budget import LimitError
from sft.data.templates import Marks, Pairs, Source

TEMPLATES = Path(__file__).parent / "fixtures" / "templates"
BIG = "{% set a = 'ab c' * 1000000 %}"
LISTS = "{% set a = ['x'] %}" + "{% set a = [a, a] %}" * 40
TWO = LISTS + "{% set b = ['x'] %}" + "{% set b = [b, b] %}" * 40
TUPLES = "{% set a = ('x',) %}" + "{% set a = (a, a) %}" * 40
RANGE = "{% for i in range(100000) %}"
END = "{% endfor %}"


def _twice(how: str, start: str = "'aa'") -> str:
    return f"{{% set a = {start} %}}" + f"{{% set a = {how} %}}" * 40


TIME = {
    "nested loops": RANGE * 2 + END * 2,
    "a loop whose body never comes": RANGE + "{% for j in range(100000) if false %}" + END * 2,
    "a long body": RANGE + "{% if i %}{% endif %}" * 4000 + END,
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(100) }}",
    "a loop in itself": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a wide loop in itself": "{% for a in range(100000) recursive %}{% if loop.depth < 9 %}{{ loop(range(100000)) }}"
    "{% endif %}{% endfor %}",
    "a block in itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "calls in calls": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + RANGE
    + "{% call f() %}" * 9
    + "x"
    + "{% endcall %}" * 9
    + END,
    "lazy filters": RANGE + "{% set a = range(100000)|select('eq', -1)|list %}" + END,
    "lazy filters of a text": BIG + RANGE + "{% set x = a|reject('string')|list %}" + END,
    "searching a text": BIG + RANGE + "{% if 'xyz' in a %}{% endif %}" + END,
    "counting in a text": BIG + RANGE + "{{ a.count('x') }}" + END,
    "searching a list": "{% set a = range(100000)|list %}{% for i in a %}{% if -1 in a %}{% endif %}{% endfor %}",
    "words": BIG + RANGE + "{{ a|wordcount }}" + END,
    "titles": "{{ ('a-' * 1000000)|title }}",
    "lists that are equal": TWO + "{{ a == b }}",
    "lists that are unequal": TWO + "{{ 'x' != a != b }}",
    "lists in order": TWO + "{{ a < b }}",
    "a test of lists": TWO + "{{ a is eq b }}",
    "a list in a list": TWO + "{{ a in [b] }}",
    "a list in an error": LISTS + "{{ raise_exception(a) }}",
    "a list as an attribute": LISTS + "{{ 1|attr(a) }}",
    "a list as an attribute of each": LISTS + "{{ messages|map(attribute=a)|list }}",
    "a list as a test": LISTS + "{{ messages|selectattr('role', a)|list }}",
    "a list in capitals": LISTS + "{{ a is upper }}",
    "a tuple as a filter": TUPLES + "{{ a is filter }}",
    "counting in a list": "{% set a = range(100000)|list %}" + RANGE + "{{ a.count('x') }}" + END,
    "the place of a list": TWO + "{{ [b].index(a) }}",
    "lists sorted": TWO + "{{ [a, b]|sort }}",
    "the larger list": TWO + "{{ [[a, b]]|map('max')|list }}",
    "lists selected": TWO + "{{ [a]|select('eq', b)|list }}",
    "a tuple as a key": TUPLES + "{{ {a: 1} }}",
    "a tuple looked up": TUPLES + "{{ {}[a] }}",
    "a tuple asked for": TUPLES + "{{ {}.get(a) }}",
    "a tuple in a table": TUPLES + "{{ a in {} }}",
    "one of many tuples": TUPLES + "{{ [a]|unique|list }}",
    "a table of tuples": TUPLES + "{{ dict([(a, 1)]) }}",
    "numbers without end": _twice("a * a", "3"),
    "a tuple in a tuple without end": "{% set n = namespace(a=()) %}"
    + "{% for i in range(300) %}{% for j in range(900) %}"
    + "{% set n.a = (n.a,) %}"
    + END * 2
    + "{% set a = {n.a: 1} %}",
    "powers": RANGE + "{% set a = 3 ** 8000 // 3 ** 4000 %}" * 20 + END,
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a large number divided": "{% set a = ('f' * 9000000)|int(0, 16) %}{{ a // 7 }}",
    "a place that no number has": "{{ 1|round(10 ** 9, 'ceil') }}",
}
SIZE = {
    "a text": "{{ 'a' * 10**10 }}",
    "a text from the left": "{{ 10**10 * 'a' }}",
    "a list": "{{ ['a'] * 10**10 }}",
    "texts doubled by ~": _twice("a ~ a"),
    "texts doubled by +": _twice("a + a"),
    "lists doubled": _twice("a + a", "[1]"),
    "blocks doubled": "{% set a %}ab{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 40,
    "doubled by the filter join": _twice("[a, a]|join"),
    "doubled by join": _twice("''.join([a, a])"),
    "doubled by %": _twice("'%s%s' % (a, a)"),
    "doubled by format": _twice("'{0}{0}'.format(a)"),
    "doubled by the filter format": _twice("'%s%s'|format(a, a)"),
    "doubled by replace": _twice("a.replace('a', 'aa')"),
    "doubled by the filter replace": _twice("a|replace('a', 'aa')"),
    "doubled by map": _twice("a|map('replace', 'a', 'aa')|list", "['aa']"),
    "replace everywhere": BIG + "{{ a.replace('', a) }}",
    "join of many": BIG + "{{ ([a] * 100000)|join }}",
    "join of what is made on the way": BIG + "{{ range(100000)|map('replace', '', a)|join }}",
    "a long separator": BIG + "{{ range(100000)|join(a) }}",
    "join with a long separator": BIG + "{{ a.join('a' * 1000000) }}",
    "values of a table": BIG + "{{ {}.fromkeys(range(100000), a).values()|join }}",
    "a width in %": "{{ '%1000000000d' % 1 }}",
    "a precision in %": "{{ '%.1000000000f' % 1 }}",
    "a width of %": "{{ '%*d' % (1000000000, 1) }}",
    "a width of a name": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "a width in the filter": "{{ '%1000000000d'|format(1) }}",
    "a width in format": "{{ '{:1000000000}'.format(1) }}",
    "a width given to format": "{{ '{:{}}'.format(1, '1000000000') }}",
    "a width in format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "a width in marked text": "{{ ('{:1000000000}'|safe).format(1) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "tabs": "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "indent": "{{ 'a\nb'|indent(10**10) }}",
    "indent by a text": BIG + "{{ ('a\n' * 100000)|indent(a) }}",
    "sum of lists": "{{ ([[1] * 1000] * 100000)|sum(start=[]) }}",
    "JSON, indented": "{{ [[1]]|tojson(indent=10**9) }}",
    "JSON with long separators": "{{ ([1] * 100000)|tojson(separators=('a' * 99999, ':')) }}",
    "a width in a number that is odd": "{{ '%1000000000d' is odd }}",
    "a width in a number that is divided": "{{ '%1000000000d' is divisibleby 3 }}",
    "JSON of lists in lists": LISTS + "{{ a|tojson }}",
    "lists in lists": LISTS + "{{ a }}",
    "lists in lists as text": LISTS + "{{ a|string }}",
    "lists in lists and a text": LISTS + "{{ a ~ '' }}",
    "lists in lists in %": LISTS + "{{ '%s' % (a,) }}",
    "lists in lists in format": LISTS + "{{ '{}'.format(a) }}",
    "lists in lists joined": LISTS + "{{ ''.join([a]|map('string')) }}",
    "lists in lists trimmed": LISTS + "{{ a|trim }}",
    "text of a loop": RANGE + "x" * 50000 + END,
    "text of a loop that is kept": "{% set a %}" + RANGE + "x" * 50000 + END + "{% endset %}",
    "text of a macro": "{% macro f(n) %}" + "x" * 50000 + "{% if n %}{% set a = f(n - 1) %}{% set a = f(n - 1) %}"
    "{% endif %}{% endmacro %}{{ f(100) }}",
    "a text again and again": BIG + RANGE + "{{ a }}" + END,
    "texts that are kept": BIG + "{% set n = namespace(l=[]) %}" + RANGE + "{% set n.l = n.l + [a[1:]] %}" + END,
    "batches": "{{ [1]|batch(10**9, 1)|list }}",
    "slices": "{{ [1]|slice(10**9)|list }}",
    "a long answer": "{{ 'a' * 10000000 }}",
    "a long template": "x" * 1000000,
}
COMPILED = {
    "parentheses": "{{ " + "(" * 40000 + "1" + ")" * 40000 + " }}",
    "sums": "{{ 1" + "+1" * 40000 + " }}",
    "attributes": "{{ a" + ".a" * 40000 + " }}",
    "lists": "{{ " + "[" * 40000 + "]" * 40000 + " }}",
    "loops": "{% for a in b %}" * 3000 + "{% endfor %}" * 3000,
    "conditions": "{% if a %}" + "{% elif b %}" * 8000 + "{% endif %}",
    "filters": "{{ a" + "|trim" * 18000 + " }}",
}


def _template(source: str) -> JinjaTemplate:
    return JinjaTemplate(Source("jinja", source, "DIR", "DIR"), Marks({}, (), "."), datetime.datetime(2026, 1, 1))


def _refused(source: str) -> str:
    """What is said of a template; it must be said within seconds of work."""
    before = time.thread_time()
    with pytest.raises(sft.UsageError) as caught:
        _template(source).render([Turn("user", "a")])
    assert time.thread_time() - before < 20
    assert isinstance(caught.value.__cause__, LimitError)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


SAMPLE = ["a macro that calls itself", "a wide loop in itself", "a tuple as a key", "lists that are equal", "a power"]
SAMPLE_OF_SIZES = ["a text", "texts doubled by ~", "join of many", "a width given to format", "lists in lists"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in TIME]
)
def test_templates_without_end(name: str) -> None:
    assert "The chat template of DIR cannot write a conversation of user: it " in _refused(TIME[name])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLE_OF_SIZES else pytest.mark.slow) for name in SIZE]
)
def test_templates_without_measure(name: str) -> None:
    assert "The chat template of DIR " in _refused(SIZE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_templates_that_no_reader_reaches_the_end_of(name: str) -> None:
    assert "is not valid Jinja (it is nested too deeply, or too long)" in _refused(COMPILED[name])


def test_pairs_of_paddlenlp_have_the_same_limits() -> None:
    source = '{"conversation": ["{{ user * 10**10 }}", "{{ bot }}"]}'
    template = Pairs(Source("pairs", source, "FILE", "FILE"), Marks({}, (), "."))
    with pytest.raises(sft.UsageError, match=r"FILE cannot be used \(it makes texts or lists without measure\)"):
        template.render([Turn("user", "a"), Turn("assistant", "b")])


def test_limits_hold_in_any_thread_and_each_text_has_its_own() -> None:
    """A text that takes 800,000 steps is within the limits, again and again, and beside another thread's."""
    busy = _template("{% for i in range(40) %}{% for i in range(10000) %}{% endfor %}{% endfor %}done")
    endless = _template(TIME["nested loops"])
    said: list[str] = []

    def work() -> None:
        try:
            endless.render([Turn("user", "a")])
        except sft.UsageError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert busy.render([Turn("user", "a")]) == busy.render([Turn("user", "a")]) == "done"
    thread.join()
    what = "it takes more steps than a conversation can need"
    assert said == [f"The chat template of DIR cannot write a conversation of user: {what}."]


@pytest.mark.parametrize("source", ["{{ [1].append(2) }}", "{{ 'a'.encode() }}", "{{ ''.__class__.mro() }}"])
def test_what_is_refused_of_one_type_is_refused_each_time_and_of_no_other(source: str) -> None:
    from jinja2.exceptions import SecurityError

    sandbox = Sandbox()
    refused = sandbox.compiled(source)
    for _ in range(2):
        with pytest.raises(SecurityError, match="is unsafe"):
            sandbox.written(refused, [], {})
    own = sandbox.compiled("{% set n = namespace(append='a', encode='b') %}{{ n.append }}{{ n.encode }}")
    assert sandbox.written(own, [], {}) == "ab"


def test_what_templates_may_still_do() -> None:
    """Each form of the operations that have limits, with the text that Jinja itself makes of it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = (
        "{% set n = namespace(text='', list=[]) %}{% for m in messages %}{{ loop.index }}/{{ loop.length }}"
        "{{ loop.last }}{% set n.text = n.text + m.content ~ 1 ~ [m.role] %}{% set n.list = n.list + [m] %}{% endfor %}"
        "{{ n.text }}{{ messages[1:]|length }}{{ messages[::-1][0]['role'] }}{{ 'abcdef'[1:-1:2] }}{{ -3 // 2 }}"
        "{{ 'a%5.1f|%s|%%|%(x)s' % {'x': 1} if false else '%5.1f|%s|%%' % (1.25, [1]) }}{{ 7 % 3 ** 2 - 1 / 4 }}"
        "{{ '{:>5}|{!r}|{a:{b}}'.format(1, 'x', a=2, b='04') }}{{ '{x}'.format_map({'x': [1]}) }}{{ 'ab'.center(8) }}"
        "{{ ['b', 'a', 'b']|unique|sort|join(', ') }}{{ ', '.join(['x', 'y']) }}{{ 'x-y'.split('-') }}{{ 'a' in 'ba' }}"
        "{{ 'tool_calls' in messages[0] }}{{ messages[0] == messages[1] }}{{ [1, 2] < [1, 3] }}{{ 1 < 2 <= 2 != 3 }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list }}"
        "{{ [3, 1]|sum }}{{ {}|length }}"
        "{{ 'a\nb'|indent(2) }}{{ 'abc'|replace('b', 'xx') }}{{ 'aXbXc'.replace('X', '--', 1) }}{{ 1.256|round(2) }}"
        "{{ {'b': 1, 'a': [2]}|dictsort }}{{ {'b': 1}.items()|list }}{{ [1, 2, 3]|batch(2, 0)|list }}{{ 'x' * 3 }}"
        "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}{{ [1, [2]]|string|upper }}"
        "{% for i in [1, [2]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}{{ 'a b'|title|wordcount }}"
        "{% for a, b in {'x': 1}.items() if b %}{{ a }}{{ b }}{% else %}none{% endfor %}{{ missing }}{{ none }}"
        "{% macro g() %}{{ caller() }}{% endmacro %}{% call g() %}z{% endcall %}"
        "{{ ('<' | safe) ~ '<' }}{{ {(1, 2): 3}[(1, 2)] }}{{ 'x'|center(5)|trim|default('y') }}"
    )
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "b"}]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    sandbox = Sandbox()
    written = sandbox.written(sandbox.compiled(source), ["你好", "b"], {"messages": messages})
    assert written == plain.render(messages=messages)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatml", "llama31", "mistral_v03", "qwen25", "qwen3"])
def test_conversations_of_10000_turns_are_within_the_limits(name: str) -> None:
    template = JinjaTemplate(
        Source("jinja", (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), "DIR", "DIR"),
        Marks({"bos_token": "<s>", "eos_token": "</s>"}, (), "</s>"),
        datetime.datetime(2026, 1, 1),
    )
    turns = [Turn("assistant" if index % 2 else "user", f"{index} {'text ' * 200}") for index in range(10_000)]
    text = template.render(turns)
    assert text.count("text") == 2_000_000


def test_lazy_filters_do_not_wait_for_lazy_filters() -> None:
    """Where a generator waits for ninety thousand others the stack overruns; in a process of its own, for it dies."""
    source = (
        "{% set n = namespace(a=range(9)|map('string')) %}{% for i in range(90000) %}"
        "{% set n.a = n.a|map('string') %}{% endfor %}{{ n.a|list }}"
    )
    code = f"from sft.data.sandbox import Sandbox\ns = Sandbox()\ns.written(s.compiled({source!r}), [], {{}})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode in (0, 1), ended
    assert ended.returncode == 0 or "LimitError" in ended.stderr
