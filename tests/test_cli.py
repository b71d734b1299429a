"""The command line: one JSON object, one line an error, and no heavy imports."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DTYPES, llama_config, llama_like, perturbed, write_checkpoint
from click.testing import CliRunner, Result

import modelkin as mk
from modelkin.cli import app
from modelkin.tensor_names import Level

HEAVY = ("torch", "transformers", "mergekit", "lm_eval", "ray")
# What would cost `kinship` more than its work, and is for other commands.
SLOW = (
    *("pydantic", "yaml", "huggingface_hub", "numba", "scipy", "plotly", "matplotlib"),
    *("importlib.metadata", "asyncio", "http", "typer"),
)
KINSHIP = ["kinship", "a", "b", "--base", "base"]
RUN = """\
base: base
models: [a, b]
merge: {preset: slerp}
evaluation: {evaluator: command, command: [echo, "{model}"], tasks: [t]}
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a base, the models a and b, and a run file."""
    rng = np.random.default_rng(0)
    base = llama_like(rng)
    write_checkpoint(tmp_path / "base", base, dtype="BF16")
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, perturbed(base, rng), dtype="BF16", shards=2)
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELKIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def _call(*words: str) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(app, list(words))


def _process(words: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process with arguments."""
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False
    )


def _python(code: str, folder: Path | None = None) -> str:
    """What a fresh Python process prints; it has to end well."""
    done = _process(["-c", code], folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What is printed


def test_the_version_is_printed() -> None:
    """`--version` prints the package's name and version, and nothing else."""
    done = _process(["-m", "modelkin.cli", "--version"])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"modelkin {mk.__version__}\n", "")


def test_kinship_prints_one_json_object(models: Path) -> None:
    """`kinship --json -` prints exactly one JSON object, and nothing on stderr."""
    words = ["kinship", "a", "b", "--base", "base", "--json", "-"]
    done = _process(["-m", "modelkin.cli", *words], models)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    said = json.loads(done.stdout)
    assert list(said) == [
        "base",
        "models",
        "compared_parameters",
        "total_parameters",
        "left_out",
        "rows_left_out",
        "strangers",
        "pcc",
        "cs",
        "ed",
        "mean",
    ]
    assert list(said["mean"]) == ["pcc", "cs", "ed"]
    assert said == mk.kinship(models / "base", [models / "a", models / "b"]).as_dict()
    assert said["base"] == "base"
    assert said["models"] == ["a", "b"]
    assert np.array(said["pcc"]).shape == (2, 2)


def test_kinship_writes_json_to_a_file(models: Path) -> None:
    """`kinship --json FILE` writes the same object to the file and prints nothing."""
    written = _call("kinship", "a", "b", "--base", "base", "--json", "out.json")
    printed = _call("kinship", "a", "b", "--base", "base", "--json", "-")
    assert (written.exit_code, written.stdout) == (0, "")
    assert (models / "out.json").read_text(encoding="utf-8") == printed.stdout


def test_kinship_prints_no_nan(models: Path) -> None:
    """A model equal to the base is null in JSON and `undefined` in tables, never NaN."""
    said = _call("kinship", "a", "base", "--base", "base", "--json", "-")
    assert "NaN" not in said.stdout
    assert json.loads(said.stdout)["pcc"][1] == [None, None]
    shown = _call("kinship", "a", "base", "--base", "base")
    assert shown.exit_code == 0
    assert "nan" not in shown.stdout.lower()
    assert "base equals the base: its kinship is undefined" in shown.stdout


@pytest.mark.usefixtures("models")
def test_kinship_prints_tables() -> None:
    """Without `--json` the three matrices are printed, with what was compared."""
    shown = _call("kinship", "a", "b", "--base", "base")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "compared 1,448 of 1,448 parameters (100.0%) with the base base" in shown.stdout
    for metric in ("pcc", "cs", "ed"):
        assert f"{metric}, mean 0." in shown.stdout


@pytest.mark.parametrize("name", ["a[red]", "[b]", "a:smile:"])
def test_names_are_printed_as_they_are(name: str, models: Path) -> None:
    """Brackets and colons in a model's name are not taken for markup."""
    (models / "a").rename(models / name)
    assert name in _call("kinship", name, "b", "--base", "base").stdout


def test_a_model_with_other_tensors_is_said_to_be_left_out(models: Path) -> None:
    """A tensor that was not compared is named in the tables."""
    rng = np.random.default_rng(1)
    base = llama_like(rng)
    write_checkpoint(models / "more", {**base, "extra": np.ones(3)}, config=llama_config(base))
    assert "left out: extra" in _call("kinship", "a", "more", "--base", "base").stdout


def test_kinship_per_level(models: Path) -> None:
    """`--per` prints a row for each group, and adds the groups to what is written."""
    shown = _call(*KINSHIP, "--per", "layer")
    assert shown.exit_code == 0
    for name in ("embeddings", "0", "1", "norm", "head", "whole model"):
        assert f"│ {name} " in shown.stdout
    said = json.loads(_call(*KINSHIP, "--per", "layer", "--json", "-").stdout)
    assert said == mk.kinship("base", ["a", "b"]).as_dict("layer")
    assert [one["name"] for one in said["groups"]][:2] == ["embeddings", "0"]


@pytest.mark.parametrize("level", ["model", "layer", "module", "tensor"])
def test_kinship_writes_csv(level: Level, models: Path) -> None:
    """`--csv` writes a line for each pair and group, which any reader of CSV gets back exactly."""
    (models / "a").rename(models / 'a, "A"')
    words = ["kinship", 'a, "A"', "b", "base", "--base", "base", "--per", level]
    assert _call(*words, "--csv", "out.csv").stdout == ""
    text = (models / "out.csv").read_text(encoding="utf-8")
    assert text == _call(*words, "--csv", "-").stdout
    head, *rows = csv.reader(text.splitlines())
    assert head == ["level", "group", "model_1", "model_2", "parameters", "pcc", "cs", "ed"]
    expected = list(mk.kinship("base", ['a, "A"', "b", "base"]).rows(level))
    assert len(rows) == len(expected)
    for row, want in zip(rows, expected, strict=True):
        assert row[:4] == list(want[:4])
        assert int(row[4]) == want.parameters
        for text, value in zip(row[5:], want[5:], strict=True):
            assert (float(text) if text else None) == value
    assert rows[1][5] == ""  # with the base itself


def test_tensors_can_be_chosen(models: Path) -> None:
    """`--include` and `--exclude` can be repeated, and narrow what is compared."""
    said = json.loads(
        _call(
            *KINSHIP,
            *("--include", "mlp", "--include", "*.norm.weight", "--exclude", "layers.1"),
            *("--per", "tensor", "--json", "-"),
        ).stdout
    )
    names = [one["name"] for one in said["groups"]]
    assert names[-1] == "model.norm.weight"
    assert len(names) == 4
    assert all("layers.0.mlp." in name for name in names[:-1])
    assert said["compared_parameters"] == said["total_parameters"] < 1448


@pytest.mark.parametrize(("file", "start"), [("out.html", b"<!doctype"), ("out.png", b"\x89PNG")])
def test_kinship_draws_a_plot(file: str, start: bytes, models: Path) -> None:
    """`--plot` writes the plot, and the tables are printed too."""
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    done = _call(*KINSHIP, "--plot", file, "--metric", "cs")
    assert done.exit_code == 0
    assert "cs, mean" in done.stdout
    assert "pcc" not in done.stdout
    assert (models / file).read_bytes().lower().startswith(start.lower())


def test_what_is_wrong_is_said_before_measuring(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plot or file that cannot be written is refused before any weight is read."""
    monkeypatch.setattr("modelkin.measuring.kinship", None)
    for words in (["--plot", "out.svg"], ["--csv", "none/out.csv"], ["--json", "a"]):
        assert _call(*KINSHIP, *words).exit_code == 2
    assert isinstance(_call(*KINSHIP).exception, TypeError)


def test_a_written_file_is_whole(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is replaced when the new one is whole: a failure leaves the older one."""
    file = models / "out.json"
    file.write_text("older")

    def fail(*_: object, **__: object) -> str:
        raise OSError(5, "broken")

    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", fail)
        assert _call(*KINSHIP, "--json", "out.json").exit_code == 2
    assert file.read_text() == "older"
    assert not [one for one in models.iterdir() if one.name.startswith(".")]
    link = models / "link.json"
    link.symlink_to(file)
    assert _call(*KINSHIP, "--json", "link.json").exit_code == 0
    assert link.is_symlink()
    assert json.loads(file.read_text())["models"] == ["a", "b"]


def test_a_pipe_is_written_to(models: Path) -> None:
    """What is no plain file is written to, not replaced."""
    pipe = models / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert _call(*KINSHIP, "--json", "pipe").exit_code == 0
    assert json.loads(os.read(reader, 1 << 16))["models"] == ["a", "b"]
    os.close(reader)
    assert pipe.is_fifo()


def test_options_reach_the_library(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option is passed on, and what was not given is left to the library's defaults."""
    found = mk.kinship("base", ["a", "b"])
    calls: list[dict[str, object]] = []

    def measure(*_: object, progress: object, **options: object) -> mk.Kinship:
        calls.append(options)
        return found

    monkeypatch.setattr("modelkin.measuring.kinship", measure)
    assert _call(*KINSHIP).exit_code == 0
    words = "--threads 2 --min-coverage 0 --no-cache --allow-pickle --include x --exclude y"
    assert _call(*KINSHIP, *words.split()).exit_code == 0
    assert calls == [
        {},
        {
            "include": ("x",),
            "exclude": ("y",),
            "threads": 2,
            "min_coverage": 0.0,
            "cache": False,
            "allow_pickle": True,
        },
    ]


def test_inspect_tells_what_models_are_and_share(models: Path) -> None:
    """`inspect` reads headers only: what models are, what differs, and whether that is too much."""
    rng = np.random.default_rng(4)
    base = llama_like(rng)
    other = {**base, "model.norm.weight": np.ones(3), "extra": np.ones(2)}
    other["model.embed_tokens.weight"] = np.ones((len(base["model.embed_tokens.weight"]) + 2, 8))
    del other["model.layers.0.mlp.up_proj.weight"]
    write_checkpoint(models / "c", other, dtype="F32", config=llama_config(base))
    # The weights are of no interest: they need not even be numbers.
    file = models / "b" / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\xff\x7f\xff\x7f")
    done = _call("inspect", "a", "b", "c", "--base", "base")
    assert (done.exit_code, done.stderr) == (0, "")
    for part in (
        "base  LlamaForCausalLM, BF16, 1,448 parameters, 21 tensors",
        "b     LlamaForCausalLM, BF16, 1,448 parameters, 21 tensors, 2.9 kB in 2 safetensors files",
        "b: has 100.0% of the parameters of base",
        "other shape: model.norm.weight: base [8], c [3]",
        "left out: 2 rows of model.embed_tokens.weight",
        "missing: model.layers.0.mlp.up_proj.weight",
        "not in base: extra",
    ):
        assert part in done.stdout
    said = json.loads(_call("inspect", "base", "b", "c", "--json", "-").stdout)
    assert said["base"] == "base"
    b, c = said["differences"]
    assert (b["coverage"], b["missing"], b["extra"], b["reshaped"]) == (1.0, [], [], {})
    assert c["extra"] == ["extra"]
    assert said["summaries"][2]["dtypes"] == {"F32": said["summaries"][2]["parameters"]}


def test_inspect_says_what_stands_in_the_way(models: Path) -> None:
    """Models whose kinship cannot be measured are inspected all the same, and told why."""
    assert "can be measured" in _call("inspect", "base", "a").stdout
    assert "compared" not in _call("inspect", "base").stdout
    _other_architecture(models)
    shown = _call("inspect", "base", "a")
    assert shown.exit_code == 0
    assert "another architecture" in shown.stdout
    assert "cannot be compared: " in shown.stdout


# What goes wrong


def _no_config(folder: Path) -> None:
    (folder / "a" / "config.json").unlink()


def _truncated(folder: Path) -> None:
    file = folder / "a" / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _no_shard(folder: Path) -> None:
    (folder / "a" / "model-00002-of-00002.safetensors").unlink()


def _not_finite(folder: Path) -> None:
    tensors = llama_like(np.random.default_rng(2))
    tensors["model.norm.weight"][3] = np.inf
    for file in (folder / "a").iterdir():
        file.unlink()
    (folder / "a").rmdir()
    write_checkpoint(folder / "a", tensors)


def _other_architecture(folder: Path) -> None:
    config = json.loads((folder / "a" / "config.json").read_text())
    (folder / "a" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2"]}))


def _empty(folder: Path) -> None:
    (folder / "empty").mkdir()


def _nothing(_: Path) -> None:
    pass


def _bad_yaml(folder: Path) -> None:
    (folder / "run.yaml").write_text("base: [\n- :")


def _bad_key(folder: Path) -> None:
    (folder / "run.yaml").write_text(f"{RUN}k: 1\n")


def _no_model(folder: Path) -> None:
    (folder / "run.yaml").write_text(RUN.replace("[a, b]", "[a, ./missing]"))


def _latin(folder: Path) -> None:
    (folder / "run.yaml").write_bytes(b"base: caf\xe9\n")


@pytest.mark.parametrize(
    ("spoil", "words", "named"),
    [
        (_nothing, ["kinship", "a", "./none", "--base", "base"], ["./none", "no such folder"]),
        (_nothing, ["kinship", "a", "b", "--base", "/none"], ["/none"]),
        (
            _nothing,
            ["kinship", "a", "a/config.json", "--base", "base"],
            ["a/config.json", "model folder"],
        ),
        (_nothing, ["kinship", "a", "--base", "base"], ["at least 2 models, found 1"]),
        (_empty, ["kinship", "a", "empty", "--base", "base"], ["empty", "config.json"]),
        (_no_config, KINSHIP, ["/a:", "config.json"]),
        (_truncated, KINSHIP, ["model-00002-of-00002.safetensors", "truncated"]),
        (_no_shard, KINSHIP, ["model-00002-of-00002.safetensors", "missing"]),
        (_not_finite, KINSHIP, ["/a/model.safetensors", "model.norm.weight", "inf", "element 3"]),
        (_other_architecture, KINSHIP, ["/a:", "LlamaForCausalLM", "GPT2"]),
        (_nothing, [*KINSHIP, "--json", "none/out.json"], ["none/out.json", "No such file"]),
        (_nothing, [*KINSHIP, "--csv", "none/out.csv"], ["none/out.csv", "No such file"]),
        (_nothing, [*KINSHIP, "--plot", "none/out.png"], ["none/out.png", "No such file"]),
        (_nothing, [*KINSHIP, "--json", "a"], ["a: ", "a folder"]),
        (_nothing, [*KINSHIP, "--plot", "out.svg"], ["out.svg", ".html or .png", "found .svg"]),
        (_nothing, [*KINSHIP, "--plot", "-"], ["-: ", ".html or .png"]),
        (_nothing, [*KINSHIP, "--json", "-", "--csv", "-"], ["--json, --csv", "at most one"]),
        (_nothing, [*KINSHIP, "--include", "lora"], ["include", "'lora'", "none of 21"]),
        (_nothing, [*KINSHIP, "--exclude", "*"], ["exclude", "none of 21"]),
        (_nothing, ["inspect", "./none"], ["./none", "no such folder"]),
        (_nothing, ["inspect", "a", "--json", "none/o"], ["none/o", "No such file"]),
        (_nothing, ["evolve", "none.yaml"], ["none.yaml", "cannot be read"]),
        (_nothing, ["evolve", "."], ["cannot be read"]),
        (_bad_yaml, ["evolve", "run.yaml"], ["run.yaml", "not valid YAML"]),
        (_latin, ["evolve", "run.yaml"], ["run.yaml", "not valid YAML"]),
        (_bad_key, ["evolve", "run.yaml", "--dry-run"], ["run.yaml", "k:", "found 1"]),
        (_no_model, ["evolve", "run.yaml", "--dry-run"], ["models.missing", "no such folder"]),
        (_nothing, ["evaluate", "a", "--config", "none.yaml"], ["none.yaml", "cannot be read"]),
        (_nothing, ["evaluate", "./none", "--config", "run.yaml"], ["./none", "no such folder"]),
        (_nothing, ["status", "a"], ["a:", "ledger.db"]),
        (_nothing, ["status", "none"], ["none:", "ledger.db"]),
        (_nothing, ["merge", "none.yaml", "out"], ["none.yaml", "cannot be read"]),
    ],
)
def test_bad_input_is_one_line(
    spoil: Callable[[Path], None], words: list[str], named: list[str], models: Path
) -> None:
    """Bad input gives exit status 2 and one line on stderr that names what is wrong."""
    spoil(models)
    done = _call(*words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in named:
        assert part in done.stderr
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    "words",
    [["kinship", "a", "./none", "--base", "base"], ["evolve", "none.yaml"], ["status", "a"]],
)
def test_a_process_says_no_more(words: list[str], models: Path) -> None:
    """In a process of its own, too, an error is one line: no traceback and no empty line."""
    done = _process(["-m", "modelkin.cli", *words], models)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["kinship", "a", "b"], ["bogus"], ["kinship", "--bogus"], []])
def test_wrong_usage_is_no_traceback(words: list[str]) -> None:
    """A missing option or an unknown command gives exit status 2 and no traceback."""
    done = _call(*words)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "command", ["kinship", "inspect", "evaluate", "merge", "evolve", "status", "demo"], ids=str
)
def test_every_command_has_help(command: str) -> None:
    """Every command says what it does."""
    done = _call(command, "--help")
    assert done.exit_code == 0
    assert f"{command} [OPTIONS]" in done.stdout


# What is imported


def test_importing_modelkin_is_light() -> None:
    """`import modelkin` loads next to nothing."""
    names = (*HEAVY, *SLOW, "numpy", "rich")
    code = f"import sys, modelkin; print([name for name in {names} if name in sys.modules])"
    assert _python(code) == "[]\n"


@pytest.mark.parametrize("options", [["--json", "out.json"], ["--per", "layer"]], ids=str)
def test_measuring_kinship_is_light(options: list[str], models: Path) -> None:
    """A whole `modelkin kinship`, on any dtype, loads nothing that it does not need."""
    rng = np.random.default_rng(3)
    for dtype in DTYPES:
        write_checkpoint(models / dtype, llama_like(rng), dtype=dtype)
    words = ["kinship", *DTYPES, "--base", "base", *options]
    code = f"""
import sys
from modelkin.cli import app
from modelkin.tensor_names import Level
try:
    app({words})
except SystemExit as done:
    print(done.code, [name for name in {(*HEAVY, *SLOW)} if name in sys.modules])
"""
    assert _python(code, models).endswith("0 []\n")
    if "--json" in options:
        assert len(json.loads((models / "out.json").read_text())["models"]) == len(DTYPES)


@pytest.mark.parametrize(("engine", "reason"), [("native", "as asked"), ("auto", "weighted sum")])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_merging_natively_is_light(method: str, engine: str, reason: str, models: Path) -> None:
    """A whole native `modelkin merge` loads no package that merges or evaluates, and says why."""
    recipe = {
        "linear": "merge_method: linear\nparameters: {weight: 1}\n",
        "slerp": "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\n",
    }[method]
    text = recipe + "dtype: bfloat16\nmodels: [{model: a}, {model: b}]\n"
    (models / "recipe.yaml").write_text(text, encoding="utf-8")
    words = ["merge", "recipe.yaml", "child", "--engine", engine, "--threads", "2"]
    code = f"""
import sys
from modelkin.cli import app
try:
    app({words})
except SystemExit as done:
    print(done.code, [name for name in {HEAVY} if name in sys.modules])
"""
    first, *others = _python(code, models).splitlines()
    assert first.startswith("engine native: ")
    assert first.endswith(reason) or reason in first
    assert others == ["made child", "0 []"]
    assert (models / "child" / "modelkin.json").exists()


def test_merging_by_mergekit_says_why(models: Path) -> None:
    """A recipe that is no weighted sum is mergekit's; asked to do it natively, it is an error."""
    pytest.importorskip("mergekit")
    (models / "recipe.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 1, density: 0.5}\ndtype: float32\n",
        encoding="utf-8",
    )
    done = _call("merge", "recipe.yaml", "out/child", "--engine", "native")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ties: merge_method ties is none of linear, ")
    assert not list((models / "out").iterdir())
    done = _call("merge", "recipe.yaml", "out/child")
    assert done.exit_code == 0
    assert done.stdout.startswith("engine mergekit: merge_method ties is none of linear, ")
    assert (models / "out" / "child" / "modelkin.json").exists()


def test_a_dry_run_is_light(models: Path) -> None:
    """`modelkin evolve --dry-run` needs none of the packages that merge or evaluate."""
    code = f"""
import sys
from modelkin.cli import app
from modelkin.tensor_names import Level
try:
    app(["evolve", "run.yaml", "--dry-run"])
except SystemExit as done:
    print(done.code, [name for name in {HEAVY} if name in sys.modules])
"""
    assert _python(code, models).endswith("\n0 []\n")


def test_what_modelkin_exports_is_pinned() -> None:
    """`modelkin.__all__` is the public interface: a change of it is a change of this test."""
    assert mk.__all__ == [
        "Kinship",
        "ModelkinError",
        "Preview",
        "Run",
        "__version__",
        "evolve",
        "kinship",
        "preview",
        "read_run",
    ]
    assert all(hasattr(mk, name) for name in mk.__all__)
    assert set(mk.__all__) <= set(dir(mk))
    with pytest.raises(AttributeError, match="'modelkin' has no attribute 'kin'"):
        _ = mk.kin
