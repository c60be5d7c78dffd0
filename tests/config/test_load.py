# ruff: noqa: E501  # a message stands on one line
"""Sweep files: what reads well, and every message of what does not."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.load import json_schema, parse, read
from orchestrator.config.spec import Launch, Metric, Reduce, Retries, SweepSpec
from orchestrator.config.yaml12 import YamlError
from orchestrator.config.yaml12 import parse as parse_yaml
from orchestrator.errors import SweepFileError

GRID = "program: train.py\nmethod: grid\nparameters:\n  lr: {values: [0.1, 0.2]}\n"
RANDOM = "program: train.py\nmethod: random\nrun_cap: 10\nparameters:\n  lr: {min: 0.1, max: 1}\n"
NESTED = GRID + "  opt: {parameters: {beta: {value: 1}}}\n  seed: {value: 3}\n  a.b: {value: 1}\n"
FULL = """\
apiVersion: x
kind: sweep
project: mine
entity: me
controller: {type: local}
description: what it is about
name: full
program: pkg.jobs:main
method: grid
metric: {name: acc, goal: maximize, at: best, impute: worst}
run_cap: 3
repeats: 2
seed: 7
parameters:
  a: {values: [1, 2]}
  b:
    parameters:
      c: {values: [x, null]}
  d: {distribution: q_uniform, min: 0, max: 1, q: 0.5}
zip: [[a, b.c]]
env: {A: "1"}
slurm: {time: 12:00:00, mem: 4G, exclusive: true, hold: null, nodes: 1}
launch: {form: trap, modules: [cuda], lease_s: 5, retries: {error: 2}}
reduce: {top: 3, slurm: {mem: 1G}}
"""
GOOD = [GRID, RANDOM, NESTED, FULL, GRID + "slurm:\nlaunch:\nenv:\nmetric:\nreduce:\nzip:\n"]


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(SweepFileError) as caught:
        parse(text, file="s.yaml", overrides=overrides)
    return caught.value.problems


def value_of(text: str) -> object:
    return parse(GRID + f"  x: {{value: {text}}}\n").parameters["x"]["value"]  # type: ignore[index,call-overload]


def test_every_key_reaches_its_place() -> None:
    assert parse(FULL) == SweepSpec(
        name="full",
        method="grid",
        program="pkg.jobs:main",
        description="what it is about",
        parameters={
            "a": {"values": [1, 2]},
            "b": {"parameters": {"c": {"values": ["x", None]}}},
            "d": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.5},
        },
        metric=Metric(name="acc", goal="maximize", at="best"),
        zip=(("a", "b.c"),),
        run_cap=3,
        repeats=2,
        seed=7,
        env={"A": "1"},
        slurm={"time": "12:00:00", "mem": "4G", "exclusive": True, "hold": None, "nodes": 1},
        launch=Launch(form="trap", modules=("cuda",), lease_s=5.0, retries=Retries(error=2)),
        reduce=Reduce(top=3, slurm={"mem": "1G"}),
    )


@pytest.mark.parametrize("text", GOOD)
def test_what_reads_well_is_valid_by_the_schema(text: str) -> None:
    parse(text)
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(parse_yaml(text).value, schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "text",
    [
        GRID + "metod: grid\n",
        GRID.replace("grid", "bayes"),
        GRID + "early_terminate: {}\n",
        GRID + "slurm: {mem: []}\n",
        GRID + "  x: {min: 1}\n",
        GRID + "  x: {min: 1, max: 2, q: 1}\n",
        GRID + "seed: '3'\n",
        GRID.replace("program: train.py\n", ""),
        GRID + "env: {A: 5}\n",
        GRID + "name: .hidden\n",
    ],
)
def test_the_schema_refuses_what_does_not_read(text: str) -> None:
    assert problems(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(parse_yaml(text).value, json_schema(), cls=jsonschema.Draft202012Validator)


# YAML 1.2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5), ("1e5", 1e5), ("1E+5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1", -1), ("+7", 7), ("010", 10),
        ("0o17", 15), ("0x1F", 31), ("1_000", "1_000"), ("0b1", "0b1"), ("017e", "017e"),
        ("12:00:00", "12:00:00"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("True", True), ("FALSE", False),
        ("~", None), ("", None), ("Null", None), ("'5'", "5"), ('"\\u00e9"', "é"), ("!!str 5", "5"), ("<<", "<<"),
        ("9223372036854775807", 2**63 - 1), ("!!float 1", 1.0), ("[a, {b: no}]", ["a", {"b": "no"}]),
    ],
)  # fmt: skip
def test_scalars_are_read_by_yaml_1_2(text: str, expected: object) -> None:
    found = value_of(text)
    assert found == expected
    assert type(found) is type(expected)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives(x: float) -> None:
    assert value_of(repr(x)) == x


def test_merges_and_anchors_are_plain_yaml() -> None:
    text = GRID + "  x: &x {min: 1, max: 3}\n  y: {<<: *x, max: 5}\n  z: {<<: [{min: 0}, *x]}\n  w: *x\n"
    found = parse(text).parameters
    assert (found["y"], found["z"]) == ({"min": 1, "max": 5}, {"min": 0, "max": 3})
    assert found["w"] == found["x"]


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
MERGE_BOMB = "a0: &a0 {}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "s.yaml:1:1: the file is empty, expected method, parameters, and program or command"),
        ("# nothing\n", "s.yaml:1:1: the file is empty, expected method, parameters, and program or command"),
        ("\n- a\n", "s.yaml:2:1: found a list, expected a mapping with method, parameters, and program or command"),
        (GRID + "---\na: 1\n", "s.yaml:5:1: a second document begins here; a sweep file holds one"),
        (
            "method: grid\n\tname: x\n",
            "s.yaml:2:1: not YAML: while scanning for the next token; found character '\\t' that cannot start any token; "
            "indent with spaces, not tabs",
        ),
        (
            "a: [1, 2\n",
            "s.yaml:2:1: not YAML: while parsing a flow sequence; expected ',' or ']', but got '<stream end>'",
        ),
        ("a: *b\n", "s.yaml:1:4: not YAML: found undefined alias 'b'"),
        ("a: &a [*a]\n", "s.yaml:1:4: this anchor holds an alias of itself"),
        ("a: &a {<<: *a}\n", "s.yaml:1:4: this anchor holds an alias of itself"),
        ("a: \x07\n", "s.yaml:1:4: character U+0007 is not allowed in YAML"),
        ("a: " + "[" * 5000, "s.yaml:1:1: nested too deeply"),
    ],
)
def test_what_is_not_one_yaml_mapping(text: str, message: str) -> None:
    assert problems(text) == [message]


@pytest.mark.parametrize("text", [BOMB, MERGE_BOMB])
def test_alias_bombs_are_defused(text: str) -> None:
    assert problems(text)[0].endswith("more than 100,000 values, aliases counted")


@given(st.text(max_size=200))
def test_no_text_gives_anything_but_a_message(text: str) -> None:
    with pytest.raises(SweepFileError):
        parse(text)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(st.characters(codec="ascii")),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=3)))  # fmt: skip
def test_any_value_anywhere_gives_messages_at_most(value: object) -> None:
    for key in (
        "name",
        "method",
        "metric",
        "parameters",
        "zip",
        "launch",
        "slurm",
        "env",
        "reduce",
        "command",
        "run_cap",
    ):
        text = yaml.safe_dump({"program": "t.py", "method": "grid", "parameters": {"a": {"value": 1}}, key: value})
        try:
            parse(text)
        except SweepFileError as error:
            assert all(problem.startswith("sweep.yaml:") for problem in error.problems)  # noqa: PT017  # may read well


# Messages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GRID + "metod: x\n", "5:1: metod: unknown key; did you mean 'method'?"),
        (GRID + "method: grid\n", "5:1: method: a second time in this mapping, after line 2"),
        (GRID.replace("method: grid\n", ""), "1:1: method: missing, allowed: grid, random"),
        (GRID.replace("grid", "bayes"), "2:9: method: bayes is not available, allowed: grid, random"),
        (GRID.replace("grid", "gird"), "2:9: method: found the string 'gird', allowed: grid, random; did you mean 'grid'?"),
        (RANDOM.replace("run_cap: 10\n", ""), "2:9: run_cap: missing, expected the number of trials: method random has no end"),
        (GRID + "run_cap: 0\n", "5:10: run_cap: found the number 0, expected at least 1"),
        (GRID + "run_cap: '10'\n", "5:10: run_cap: found the string '10', expected an integer"),
        (GRID + "repeats: 1e1\n", "5:10: repeats: found the number 10.0, expected an integer; write 10"),
        (GRID + "repeats: true\n", "5:10: repeats: found true, expected an integer"),
        (GRID + "seed: -1\n", "5:7: seed: found the number -1, expected at least 0"),
        (GRID + "seed: 99999999999999999999\n", "5:7: seed: found 99999999999999999999, expected an integer of at most 64 bits"),
        (GRID + "metric: {goal: minimise}\n", "5:16: metric.goal: found the string 'minimise', allowed: minimize, maximize; did you mean 'minimize'?"),
        (GRID + "metric: val_loss\n", "5:9: metric: found the string 'val_loss', expected a mapping"),
        (GRID + "metric: {name: a, target: 3}\n", "5:19: metric.target: ending a sweep at a target is not available; without this key every trial runs"),
        (GRID + "early_terminate: {type: hyperband}\n", "5:1: early_terminate: stopping trials early is not available yet; without this key every trial runs to its end"),
        (GRID + "scheduler: {}\n", "5:1: scheduler: schedulers of one's own are not available; give method: grid or random"),
        (GRID + 'name: "a\\nb"\n', "5:7: name: found the string 'a\\nb', expected 1 to 64 of A-Z a-z 0-9 . _ -, not beginning with a dot or a dash"),
        (GRID + "name: $(reboot)\n", "5:7: name: found the string '$(reboot)', expected 1 to 64 of A-Z a-z 0-9 . _ -, not beginning with a dot or a dash"),
        (GRID + "name: -x\n", "5:7: name: found the string '-x', expected 1 to 64 of A-Z a-z 0-9 . _ -, not beginning with a dot or a dash"),
        (GRID.replace("train.py", "train.sh"), "1:10: program: found the string 'train.sh', expected train.py, train.py:function or package.module:function; anything else that can run is a command"),
        (GRID.replace("program: train.py\n", ""), "1:1: neither program nor command is given, expected one of them"),
        (GRID + "command: [python, x.py]\n", "5:1: command: command and program are both given, expected one of them, or ${program} in command"),
        (GRID + "command: ['${program}', '${arg}']\n", "5:25: command[1]: unknown macro ${arg}; did you mean '${args}'?"),
        (GRID + "launch: {pack: 0}\n", "5:16: launch.pack: found the number 0, expected at least 1"),
        (GRID + "launch: {pack: 1.5}\n", "5:16: launch.pack: found the number 1.5, expected an integer"),
        (GRID + "launch: {pack: 8, ranks_per_node: 2}\n", "5:16: launch.pack: found 8, expected 1 with ranks_per_node: 2: a pack is one process"),
        (GRID.replace("program: train.py", "command: [x]") + "launch: {pack: 8}\n", "5:16: launch.pack: found 8, expected 1 with a command: a pack is one process"),
        (GRID + "launch: {pack: 8, trials_per_task: 4}\n", "5:16: launch.pack: found 8, expected at most launch.trials_per_task, 4: the trials of a pack are of one block"),
        (GRID + "launch: {trials_per_gpu: 2}\n", "5:26: launch.trials_per_gpu: found 2, expected launch.gpus with it: 1 for each trial"),
        (GRID + "launch: {nodes: 2, form: trap}\n", "5:26: launch.form: found the string 'trap', expected srun with launch.nodes: 2"),
        (GRID + "launch: {nodes: 2}\nslurm: {ntasks: 4}\n", "6:9: slurm.ntasks: is given, expected launch.nodes: 2 alone to say it"),
        (GRID + "launch: {ranks_per_node: 0}\n", "5:26: launch.ranks_per_node: found the number 0, expected at least 1"),
        (GRID + "command: ['${program}', 5]\n", "5:25: command[1]: found the number 5, expected a string; quote it: '5'"),
        (GRID + "env: {A: 5}\n", "5:10: env.A: found the number 5, expected a string; quote it: '5'"),
        (GRID + "env: {A B: x}\n", "5:7: env.A B: not a variable's name, expected letters, digits and _, not beginning with a digit"),
        (GRID + "slurm: {array: 0-3}\n", "5:9: slurm.array: not for you to set: set by the number of blocks; see launch.trials_per_task, launch.max_workers and launch.throttle"),
        (GRID + "slurm: {job-name: x}\n", "5:9: slurm.job-name: not for you to set: give name"),
        (GRID + "slurm: {tiem: 5}\n", "5:9: slurm.tiem: unknown option; did you mean 'time'?"),
        (GRID + "slurm: {mem_per_cpu: 5}\n", "5:9: slurm.mem_per_cpu: unknown option; did you mean 'mem-per-cpu'?"),
        (GRID + "slurm: {p: low}\n", "5:9: slurm.p: a short option, expected the long one: partition"),
        (GRID + 'slurm: {mem: "1\\n2"}\n', "5:14: slurm.mem: found the string '1\\n2', expected one line of printable characters"),
        (GRID + "reduce: {slurm: {wrap: x}}\n", "5:18: reduce.slurm.wrap: not for you to set: give program or command"),
        (GRID + "launch: {form: trp}\n", "5:16: launch.form: found the string 'trp', allowed: auto, exec, trap, srun; did you mean 'trap'?"),
        (GRID + "launch: {retries: {oom: 1}}\n", "5:20: launch.retries.oom: unknown key; allowed: error, signal, memory, timeout, unknown"),
        (GRID + "launch: {lease_s: 0}\n", "5:19: launch.lease_s: found the number 0, expected more than 0"),
        (GRID + "launch: {venv: a, conda: b}\n", "5:10: launch.venv: conda and venv are given, expected at most one environment"),
        ("program: t.py\nmethod: grid\nparameters:\n", "3:12: parameters: found null, expected a mapping"),
        ("program: t.py\nmethod: grid\nparameters: {}\n", "3:13: parameters: found an empty mapping, expected at least one parameter"),
        (GRID + "  x: 0.1\n", "5:6: parameters.x: found the number 0.1, expected a mapping, such as {value: 0.1}"),
        (GRID + "  x: {vlaue: 1}\n", "5:7: parameters.x.vlaue: unknown key; did you mean 'value'?"),
        (GRID + "  x: {values: []}\n", "5:15: parameters.x.values: found an empty list, expected a list of at least one"),
        (GRID + "  x: {values: [1, 2, 1.0]}\n", "5:22: parameters.x.values[2]: found the number 1.0, the same as [0]; to run configurations more than once, give repeats"),
        (GRID + "  x: {min: 0.1, max: 1}\n", "5:3: parameters.x: uniform can't be enumerated by a grid, expected value, values, int_uniform or q_uniform, or method: random"),
        (GRID + "  1x: {value: 1}\n", "5:3: parameters.1x: not a parameter's name, expected letters, digits, _ . -, beginning with a letter or _"),
        (GRID + "  5: {value: 1}\n", "5:3: parameters: found the key 5, which is not a string; quote it"),
        (GRID + "  x: {value: .inf}\n", "5:14: parameters.x.value: found .inf, expected a finite number"),
        (GRID + '  x: {value: "\\0"}\n', "5:14: parameters.x.value: found a string with a NUL or half a surrogate pair, which no file can carry"),
        (GRID + "  x: {value: !!python/object/apply:os.system ls}\n", "5:14: parameters.x.value: tag !!python/object/apply:os.system is not allowed here; write the value without it"),
        (GRID + "  x: {parameters: {y: {value: 1}}, value: 2}\n", "5:36: parameters.x.value: a parameter with nested parameters has no other key"),
        (NESTED + "  opt.beta: {value: 2}\n", "8:3: parameters.opt.beta: two parameters are called opt.beta"),
        (RANDOM + "  x: {min: 3, max: 1}\n", "6:12: parameters.x.min: found the number 3, expected at most max, which is 1"),
        (RANDOM + "  x: {distribution: log_uniform_values, min: 0, max: 1}\n", "6:46: parameters.x.min: found the number 0, expected a number above 0: log_uniform_values is uniform in the logarithm"),
        (RANDOM + "zip: [[lr, x]]\n", "6:1: zip: parameters drawn at random can't advance together, expected method: grid"),
        (GRID + "  x: {values: [1, 2, 3]}\nzip: [[lr, x]]\n", "6:7: zip[0]: found lists of unequal length: lr has 2, x has 3"),
        (GRID + "  x: {values: [1, 2]}\nzip: [[lr, y]]\n", "6:12: zip[0][1]: 'y' is no parameter with values"),
        (GRID + "zip: [lr]\n", "5:7: zip[0]: found the string 'lr', expected a list of parameter names"),
        (GRID + "  x: {min: 0, max: 10000000}\n", "3:1: parameters: a grid of 20,000,002 trials, expected at most 10,000,000, or run_cap"),
    ],
)  # fmt: skip
def test_messages(text: str, expected: str) -> None:  # each file has exactly one problem
    assert problems(text) == [f"s.yaml:{expected}"]


def test_all_problems_come_at_once_and_in_order() -> None:
    text = "metod: grid\nseed: x\nparameters:\n  a: 1\n  b: {values: []}\nslurm: {wrap: x}\nenv: {A: 1}\n"
    where = [problem.split(": ")[0] for problem in problems(text, "run_cap=0", "zzz=1")]
    assert where[:-2] == [f"s.yaml:{at}" for at in ("1:1", "1:1", "1:1", "2:7", "4:6", "5:15", "6:9", "7:10")]
    assert [at.split(" '")[0] for at in where[-2:]] == ["argument", "argument"]


def test_the_name_is_the_stem_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "digits.yaml"
    path.write_text(GRID)
    assert read(path).name == "digits"
    bad = tmp_path / "my sweep.yaml"
    bad.write_text(GRID)
    with pytest.raises(SweepFileError, match="name: found the string 'my sweep'"):
        read(bad)


def test_bom_is_skipped_and_other_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GRID.encode())
    assert read(path).method == "grid"
    path.write_bytes(GRID.encode("utf-16"))
    with pytest.raises(SweepFileError, match=":1:1: UTF-16, expected UTF-8"):
        read(path)
    path.write_bytes(b"a: 1\nb: \xc3\xa9 caf\xe9\n")
    with pytest.raises(SweepFileError, match=":2:9: byte 0xe9 is not UTF-8"):
        read(path)


@pytest.mark.parametrize(("name", "message"), [("none.yaml", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(SweepFileError, match=message):
        read(tmp_path / name)


def test_program_in_command_is_put_in_place() -> None:
    spec = parse(GRID + "command: ['${env}', python, '${program}', '${args}']\n")
    assert (spec.program, spec.command) == (None, ("${env}", "python", "train.py", "${args}"))


# Overrides


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("lr=0.5", ("parameters", "lr"), {"value": 0.5}),
        ("lr=1e-3,1e-2", ("parameters", "lr"), {"values": [1e-3, 1e-2]}),
        ("lr=1,", ("parameters", "lr"), {"values": [1]}),
        ("lr=[1, 2]", ("parameters", "lr"), {"value": [1, 2]}),
        ("lr=[1],[2]", ("parameters", "lr"), {"values": [[1], [2]]}),
        ("lr={min: 1, max: 3}", ("parameters", "lr"), {"min": 1, "max": 3}),
        ("parameters.lr=3", ("parameters", "lr"), {"value": 3}),
        ("parameters.lr.values=3,4", ("parameters", "lr"), {"values": [3, 4]}),
        ("lr.values=3,4", ("parameters", "lr"), {"values": [3, 4]}),
        ("opt.beta=a,'b,c'", ("parameters", "opt"), {"parameters": {"beta": {"values": ["a", "b,c"]}}}),
        ("a.b=2", ("parameters", "a.b"), {"value": 2}),
        ("seed=5", ("seed",), 5),
        ("parameters.seed=5", ("parameters", "seed"), {"value": 5}),
        ("parameters.new.value=no", ("parameters", "new"), {"value": "no"}),
        ("metric.goal=maximize", ("metric", "goal"), "maximize"),
        ("slurm.time=12:00:00", ("slurm", "time"), "12:00:00"),
        ("slurm.constraint='a,b'", ("slurm", "constraint"), "a,b"),
        ("launch.modules=cuda,gcc", ("launch", "modules"), ["cuda", "gcc"]),
        ("description=''", ("description",), ""),
        ("name=a # comment", ("name",), "a"),
        ("program=jobs/t.py:main", ("program",), "jobs/t.py:main"),
    ],
)
def test_overrides(override: str, path: tuple[str, ...], expected: object) -> None:
    found: object = parse(NESTED, overrides=[override]).to_json()
    for part in path:
        assert isinstance(found, dict)
        found = found[part]
    assert found == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("lrr=3", "no key or parameter 'lrr'; did you mean 'lr'?"),
        ("qqq=3", "no key or parameter 'qqq'; to add one, give parameters.NAME.value"),
        ("lr=[1", "not YAML: while parsing a flow sequence; expected ',' or ']', but got '<stream end>'; "
                  "quote the value if it holds YAML's own characters"),
        ("method=bayes", "method: bayes is not available, allowed: grid, random"),
        ("program.x=3", "program is the string 'train.py', nothing is inside it"),
        ("metric.gaol=3", "metric.gaol: unknown key; did you mean 'goal'?"),
        ("lr.min=3", "parameters.lr.min: not a key of categorical, allowed: values"),
        ("lr=.nan", "found .nan, expected a finite number"),
        ("env.A=5", "env.A: found the number 5, expected a string; quote it: '5'"),
    ],
)  # fmt: skip
def test_messages_about_overrides(override: str, message: str) -> None:
    assert problems(GRID, override) == [f"argument {override!r}: {message}"]


def test_an_override_mends_what_it_replaces() -> None:
    assert parse(GRID + "seed: x\n", overrides=["seed=3"]).seed == 3


def test_yaml_errors_carry_their_place() -> None:
    with pytest.raises(YamlError) as caught:
        parse_yaml("a: b: c")
    assert caught.value.place == (1, 5)
