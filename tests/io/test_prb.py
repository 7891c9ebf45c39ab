"""The small language of .prb files: what is understood, and that nothing is executed or grows without bounds."""

from __future__ import annotations

import subprocess
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ks4stream.errors import ProbeError
from ks4stream.io import prb
from ks4stream.io.prb import evaluate

GROUPS = {0: {"channels": [0, 1, 2, 3], "geometry": {0: [0, 0], 1: [0, 25], 2: [0, 50], 3: [0, 75]}}}

FORMS = {
    "numpy 2": """
        channel_groups = {0: {'channels': [np.int64(0), np.int64(1), np.int64(2), np.int64(3)], 'geometry': {
            np.int64(0): [np.float64(0.0), np.float64(0.0)], 1: [np.float32(0.0), numpy.float64(25.0)],
            2: [np.float64(0.0), np.uint16(50)], 3: [0, np.float64(7.5e1)]}}}""",
    "list of range": """
        channel_groups = {0: {'channels': list(range(4)), 'geometry': {0: [0, 0], 1: [0, 25], 2: [0, 50], 3: [0, 75]}}}
        """,
    "range": """
        channel_groups = {0: {'channels': range(0, 4), 'geometry': {0: [0, 0], 1: [0, 25], 2: [0, 50], 3: [0, 75]}}}
        """,
    "dict and zip": """
        channel_groups = dict([(0, dict(channels=[0, 1, 2, 3],
                                        geometry=dict(zip(range(4), [[0, 0], [0, 25], [0, 50], [0, 75]]))))])""",
    "comprehensions": """
        channel_groups = {group: {
            'channels': [channel for channel in range(8) if channel < 4 and not channel == 9],
            'geometry': {channel: [0, 25 * channel] for channel in range(4)},
        } for group in range(1)}""",
    "names used before": """
        import numpy as np
        from pathlib import Path
        here = Path(__file__).parent
        total_nb_channels, pitch = 4, 50 / 2
        channels = list(range(total_nb_channels))
        geometry = dict((c, [0, pitch * c]) for c in channels)
        labels = ["channel %d" % c for c in channels]
        channel_groups = {0: {'channels': channels, 'graph': [], 'geometry': geometry}}
        del_ = 1; print("made", here)""",
    "assignment by subscript": """
        channel_groups = {}
        channel_groups[0] = {}
        channel_groups[0]['channels'] = [0, 1, 9, 3]
        channel_groups[0]['channels'][-2] = 2
        channel_groups[0]['geometry'] = {0: [0, 0], 1: [0, 25], 2: [0, 50]}
        channel_groups[0]['geometry'][3] = [0, 75]""",
    "loops": """
        geometry, channels, y = {}, [], 0
        for i, channel in enumerate(range(4)):
            if i % 2 == 1:
                geometry[channel] = [0, y]
            else:
                geometry.update({channel: [0, y]})
            channels.append(channel)
            y += 25
        channel_groups = {0: {'channels': channels, 'geometry': geometry}}""",
}


def groups_of(text: str) -> Any:
    indent = min((len(line) - len(line.lstrip()) for line in text.splitlines()[1:] if line.strip()), default=0)
    text = "\n".join(line[indent:] if not line[:indent].strip() else line for line in text.splitlines())
    groups = evaluate(text, ["channel_groups"], "p.prb")["channel_groups"]
    return {key: {name: group[name] for name in ("channels", "geometry")} for key, group in groups.items()}


@pytest.mark.parametrize("form", FORMS)
def test_forms_in_common_use_describe_the_same_probe(form: str) -> None:
    assert groups_of(FORMS[form]) == GROUPS


EXPRESSIONS = """
1 + 2 * 3 - 4 / 8 // 1 % 5 ** 2
-(+3), not 0, 1 < 2 <= 2, 3 > 2 > 2, 1 != 1.0, "a" in "cab", 3 not in {1: 3}
(1 or 2), (0 or 2), (1 and 2), (0 and 2), (None or 3), (3 if [] else 4)
[0] * 3 + [1, *range(2)], (1,) + (2,), 2 * "ab", "a" + "b"
{**{1: 2}, 3: 4}, {1, 2, 1}, {(1, 2): 3}
range(4, 0, -1)[1:3], (1, 2, 3)[-1], {"a": 5}["a"], "abc"[::-1]
[i * j for i in range(3) if i for j in range(i)], {i % 2 for i in range(5)}, sum(i for i in range(5))
sorted([3, 1, 2]), list(reversed((1, 2))), max(3, 5), min([3, 5]), abs(-3), round(2.4), round(2.46, 1), len("abc")
list(enumerate("ab", 1)), list(zip([1, 2], (3, 4, 5))), tuple([1]), set([1, 1]), dict([(1, 2)], a=3), str(3)
dict({"a": 1, "b": 2}, **{"b": 3}, c=4)
int("3"), int(2.9), float(3), [k + v for k, v in {1: 2}.items()], list({1: 2}.keys()), list({1: 2}.values())
""".strip().splitlines()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_values_are_those_that_python_finds(expression: str) -> None:
    expected = eval(expression)
    assert evaluate(f"x = {expression}", ["x"], "p.prb") == {
        "x": tuple(list(part) if isinstance(part, range) else part for part in expected)
        if isinstance(expected, tuple)
        else expected
    }


def test_statements_change_what_they_change_in_python() -> None:
    text = """
a = b = [0]
a += [1]
b.append(2)
b.extend((3, 4))
n: int = 2
n **= 3
i = 7
c = [i for i in range(3)]
if i == 7: d = "kept"
else: d = "lost"
for _ in []: pass
else: (e, [f]) = 1, [2]
unset: int
"""
    names: dict[str, Any] = {}
    exec(text, {}, names)
    assert evaluate(text, [*"abnicdef", "unset"], "p.prb") == {
        name: value for name, value in names.items() if not name.startswith("_")
    }


OUTSIDE = [
    "open('ran', 'w')",
    "x = [open('ran', 'w')]; y = x",
    "__import__('os').system('touch ran')",
    "import os; os.system('touch ran')",
    "from os import *",
    'exec(\'open("ran", "w")\')',
    "x = eval('1'); y = x",
    "().__class__.__bases__[0].__subclasses__()",
    "x = np.__loader__; y = x",
    "np.load('ran')",
    "x = np.array([1, 2]); y = x * 2",
    "x = (lambda: open('ran', 'w'))()",
    "(x := 3)",
    "x = 1 if (y := 2) else f()",
    "def f(): pass",
    "class A: pass",
    "while True: pass",
    "with open('ran', 'w'): pass",
    "try: pass\nfinally: open('ran', 'w')",
    "del np",
    "global x",
    "assert 1",
    "raise ValueError",
    "a.b = 1",
    "np.b = 1",
    "x = [0]\nx.sort()",
    "x = y = [0]\nx *= 2",
    "x = [0]\nadd = x.append",
    "x = [0]\ny = x.pop()",
    "x = [3]\ny = f(x)",
    "x = [0]\nx[0:1] = [2]",
    "x = [0]\nx[1] = 2",
    "x = f'{3}'; y = x",
    "x = '%d' % 3; y = x",
    "x = b'a'; y = x",
    "x = 1j; y = x",
    "x = (-1) ** 0.5; y = x",
    "x = 1 / 0; y = x",
    "x = 1 @ 1; y = x",
    "x = [3] < [4]; y = x",
    "x = 1 is 1; y = x",
    "x = range; y = x",
    "x = {[]: 1}; y = x",
    "x = {}[0]; y = x",
    "x = y",
    "range = f; x = range(3); y = x",
    "from m import ceil as round\nx = round(2.5); y = x",
    "x, y = 1, 2, 3",
    "for x in 3: pass",
    "x = await f()",
    "async def f(): pass",
]


@pytest.mark.parametrize("text", OUTSIDE)
def test_what_is_outside_is_an_error_and_is_not_executed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProbeError, match=r"^p\.prb, line \d: .+ cannot be evaluated: .+ not executed here.*as JSON:"):
        evaluate(text, ["x", "y"], "p.prb")
    assert list(tmp_path.iterdir()) == []


def test_the_error_shows_the_expression_and_its_line() -> None:
    with pytest.raises(
        ProbeError, match=r"^p\.prb, line 3: 'get\(1\)' cannot be evaluated: the function is not supported"
    ):
        evaluate("a = 1\nx = [a,\n  get(1)]", ["x"], "p.prb")
    with pytest.raises(ProbeError, match="line 1: 'b' cannot be evaluated: name 'b' is not defined"):
        evaluate("x = 1 + b", ["x"], "p.prb")


def test_what_is_outside_is_named_in_words() -> None:
    with pytest.raises(ProbeError, match="'is' is not supported here; use == or !="):
        evaluate("x = None is None", ["x"], "p.prb")
    with pytest.raises(ProbeError, match="only a dictionary with strings as keys can follow"):
        evaluate("x = dict(**{0: 1})", ["x"], "p.prb")


@pytest.mark.parametrize("name", ["a $(touch b).prb", 'it\'s "a" `c`.prb'])
def test_the_command_that_is_offered_runs_the_program_that_it_shows(name: str) -> None:
    with pytest.raises(ProbeError) as caught:
        evaluate("x = get(1)", ["x"], name)
    command = str(caught.value).partition("probe as JSON: python -c ")[2]
    shown = subprocess.run(["sh", "-c", f"printf %s {command}"], capture_output=True, text=True, check=False).stdout
    assert shown.endswith(f"p.read_prb({name!r}))")


def test_what_is_outside_does_no_harm_where_nothing_depends_on_it() -> None:
    text = "import os, sys as s\nhome = os.environ['HOME']\nversion = f(home, 'v')\ntext = f'{version}'\nx = 3"
    assert evaluate(text, ["x"], "p.prb") == {"x": 3}
    with pytest.raises(ProbeError, match=r"^p\.prb, line 2: 'os\.environ' cannot be evaluated"):
        evaluate(text, ["version"], "p.prb")
    assert evaluate("name = 'p'\npath = join(here, name)\nx = name + '1'", ["x"], "p.prb") == {"x": "p1"}
    later = "i = 5\ny = [f(i) for i in (1, 2)]\nx = i"  # the comprehension's own i is gone with it
    assert evaluate(later, ["x"], "p.prb") == {"x": 5}


BOMBS = {
    "power": "x = 10 ** 10 ** 10",
    "product": "x = 3\nfor i in range(1000): x = x * x",
    "string": "x = 'a' * 10 ** 9",
    "list": "x = [0] * 10 ** 9",
    "tuple": "x = 10 ** 9 * (0,)",
    "doubled": "x = [0]\nfor i in range(100): x += x",
    "doubled string": "x = 'a'\nfor i in range(100): x = x + x\ny = x",
    "extended": "x = [0]\nfor i in range(100): x.extend(x)",
    "range": "x = range(10 ** 9)",
    "huge range": "x = range(-2 ** 62, 2 ** 62)",
    "for": "for i in range(10 ** 9): pass",
    "nested for": "for i in range(2000):\n  for j in range(2000):\n    pass",
    "comprehension": "x = [0 for a in range(2000) for b in range(2000) for c in range(2000)]",
    "generator": "x = max(a for a in range(2000) for b in range(2000))",
    "dictionary": "x = {(a, b): 0 for a in range(2000) for b in range(2000)}",
    "zip": "x = zip(*[range(1000)] * 2000)",
    "unfolding comparison": "a, b = [0], [0]\nfor i in range(99): a, b = [a, a], [b, b]\nx = a == b",
    "unfolding key": "a = (0,)\nfor i in range(99): a = (a, a)\nx = {a: 0}",
    "unfolding member": "a = (0,)\nfor i in range(99): a = (a, a)\nx = {a}",
    "circle": "a = []\na.append(a)\nx = a == a",
    "sum of lists": "x = sum([[0] * 1000] * 1000, [])",
    "long keys": "a = 'a' * 400000\nb = 'a' * 400000\nx = max([a, b] * 50000)",
    "long tuples": "a = (0,) * 300000\nx = set([a] * 300000)",
    "digits": "x = int('9' * 400000)",
    "rounding": "x = round(5, -10 ** 9) + y",
    "format": "x = '%1000000000d' % 1",
    "brackets": "x = " + "[" * 5000 + "]" * 5000,
    "signs": "x = " + "-" * 100_000 + "1",
    "terms": "x = " + "1 + " * 50_000 + "1",
    "fewer terms": "x = " + "1 + " * 900 + "1",  # Python can parse it
    "subscripts": "x = a" + "[0]" * 50_000,
    "not": "x = " + "not " * 50_000 + "1",
    "long": "x = [" + "0," * 5_000_000 + "]",
    "failures": f"for i in range(100000): y = f({'1,' * 1000})",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_time_and_memory_are_bounded(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fiftieth of the budget, for tracing memory takes time."""
    monkeypatch.setattr(prb, "_BUDGET", 40_000)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ProbeError, match=r"p\.prb"):
        evaluate(BOMBS[bomb], ["x", "y"], "p.prb")
    seconds, peak_bytes = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 30  # of the processor, on any machine: some take 2, and without a bound they would not end
    assert peak_bytes < 100e6  # 48 MB for the syntax tree of the subscripts; the values take less than 4


@pytest.mark.slow
def test_a_reason_given_again_and_again_takes_no_memory() -> None:
    """An exception would keep every frame that it has passed: 2 kB for each time that the name is read."""
    tracemalloc.start()
    assert evaluate("y = f()\nfor i in range(10000): x = y\nx = 1", ["x"], "p.prb") == {"x": 1}
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5e6  # 1 MB for the numbers; 24 MB with the frames


@pytest.mark.slow
def test_the_whole_budget_is_seconds() -> None:
    began = time.process_time()
    with pytest.raises(ProbeError, match="needs more than 2000000 steps"):
        evaluate(BOMBS["comprehension"], ["x"], "p.prb")
    assert time.process_time() - began < 60  # of the processor, on any machine; 4 on one of 2024


@pytest.mark.slow
def test_a_budget_reaches_for_the_largest_arrays() -> None:
    """Of 5000 contacts, more than any array has that is sorted at once, as write_prb writes them."""
    contacts = "".join(f"{i}: [np.float64({i}.0), np.float64(0.0)],\n" for i in range(5000))
    channels = [np.int64(i) for i in range(5000)]
    groups = groups_of(f"channel_groups = {{0: {{'channels': {channels}, 'geometry': {{{contacts}}}}}}}")
    assert groups[0]["channels"] == list(range(5000)) and groups[0]["geometry"][4999] == [4999.0, 0.0]


def test_backslashes_in_strings_are_no_warning() -> None:
    assert evaluate("path = 'C:\\probes'\nx = 1", ["x"], "p.prb") == {"x": 1}
