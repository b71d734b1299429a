"""What rounding does to the children of merges: predicted and measured, flat and step by step.

    python benchmarks/rounding.py                # the figures of docs/gram-algebra.md, 2 minutes
    python benchmarks/rounding.py --quick        # smaller models, to see that it works

Makes random Llama-shaped models in a scratch folder: matrices of standard deviation 0.02, norms
around 1, and fine-tunes whose change is normal noise of a given standard deviation. Their kinship
is that of the noise, of which a part is common to all. Then

- children of two, in float32 and bfloat16: kinship to a parent as predicted from the parents'
  statistics, as measured in the written child, and as expected of a rounding error that is
  independent of everything and of variance ulp²/12;
- lineages of ten generations: written in bfloat16 by each generation, natively and by mergekit,
  against the same descendant made from the foundations by its flat recipe, rounded once. The truth
  is the float64 sum of the foundations' weights by the predicted factors;
- each method by mergekit in bfloat16, and told to compute in float32, against the native child.

Prints tables, writes JSON and, with --figure, a picture. Needs mergekit, and matplotlib for that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from kinship import SHAPES, tensor_shapes

from modelkin.blend import Lineage, flat_recipe
from modelkin.checkpoint import as_float64, open_checkpoint
from modelkin.measuring import measure
from modelkin.merging import Mergekit, Native
from modelkin.similarity import kinship_from

SHAPES["4M"] = {"hidden": 256, "mlp": 704, "kv": 128, "layers": 4, "vocab": 4096, "tied": True}
DTYPES = {"bfloat16": ("BF16", 7), "float32": ("F32", 23)}  # name in headers, bits of mantissa
# Of parents and child.
FORMATS = (("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32"))
SIZES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
KINSHIPS = (0.0, 0.5, 0.9)
FOUNDATIONS = ("a", "b", "c", "d")
GENERATIONS = 10
SPREAD = 1e-3  # of lineages and methods
# Lineage -> the part of each generation in the next, the recipe of the elder and a foundation.
LINEAGES: Mapping[str, tuple[float, Callable[[str, str], dict[str, Any]]]] = {
    "slerp, t = 0.4": (0.6, lambda elder, other: slerp(elder, other, 0.4)),
    "slerp, t = 0.1": (0.9, lambda elder, other: slerp(elder, other, 0.1)),
    "nuslerp, 0.6 and 0.4": (
        0.6,
        lambda elder, other: weighted("nuslerp", {elder: 0.6, other: 0.4}),
    ),
}


def weighted(method: str, models: Mapping[str, float | None], **keys: Any) -> dict[str, Any]:
    """A recipe in which each model has a weight, or none."""
    entries = [
        {"model": name} | ({} if weight is None else {"parameters": {"weight": weight}})
        for name, weight in models.items()
    ]
    return {"merge_method": method, "models": entries, "dtype": "bfloat16", **keys}


def slerp(one: str, other: str, t: float) -> dict[str, Any]:
    return weighted("slerp", {one: None, other: None}, base_model=one, parameters={"t": t})


METHODS = {
    "linear": weighted("linear", {"a": 0.3, "b": 0.9, "c": 0.5}),
    "task_arithmetic": weighted("task_arithmetic", {"a": 0.6, "b": 0.7}, base_model="base"),
    "slerp": slerp("a", "b", 0.4),
    "nuslerp": weighted("nuslerp", {"a": 0.6, "b": 0.4}),
    "nuslerp, with base": weighted("nuslerp", {"a": 0.6, "b": 0.4}, base_model="base"),
    "multislerp": weighted("multislerp", {"a": 0.2, "b": 0.5, "c": 0.4}),
    "multislerp, with base": weighted("multislerp", {"a": 0.2, "b": 0.5}, base_model="base"),
    "karcher": weighted("karcher", {"a": None, "b": None, "c": None}),
    "model_stock": weighted("model_stock", {"a": None, "b": None, "c": None}, base_model="base"),
}


# Models


def make_family(
    folder: Path, size: str, names: Sequence[str], *, spread: float, kinship: float, dtype: str
) -> None:
    """A base and fine-tunes of it, whose changes have that standard deviation and correlation."""
    rng = np.random.default_rng(0)
    shapes = dict(tensor_shapes(size))
    base = {
        name: (len(shape) == 1) + 0.02 * rng.standard_normal(shape)
        for name, shape in shapes.items()
    }
    common = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    write(folder / "base", size, base, dtype)
    for name in names:
        own = {
            tensor: values
            + spread * np.sqrt(kinship) * common[tensor]
            + spread * np.sqrt(1 - kinship) * rng.standard_normal(values.shape)
            for tensor, values in base.items()
        }
        write(folder / name, size, own, dtype)


def write(folder: Path, size: str, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """A checkpoint with the weights rounded to nearest even."""
    folder.mkdir(parents=True)
    shape = SHAPES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": shape["vocab"],
        "tie_word_embeddings": True,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    end = 0
    for name, values in tensors.items():
        bits = values.astype(np.float32).view(np.uint32)
        if dtype == "bfloat16":
            bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        parts.append(bits.tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {
            "dtype": DTYPES[dtype][0],
            "shape": values.shape,
            "data_offsets": [begin, end],
        }
    spelled = json.dumps(header).encode()
    spelled += b" " * (-len(spelled) % 8)
    content = len(spelled).to_bytes(8, "little") + spelled + b"".join(parts)
    (folder / "model.safetensors").write_bytes(content)


def weights(folder: Path) -> np.ndarray:
    """All weights of a model, in float64, tensor after tensor by their names."""
    tensors = open_checkpoint(folder).tensors
    return np.concatenate(
        [
            as_float64(tensors[name].read(0, tensors[name].count), tensors[name].format).ravel()
            for name in sorted(tensors)
        ]
    )


def ulp(values: np.ndarray, dtype: str) -> np.ndarray:
    """The distance of neighbouring numbers of the format at each value."""
    return np.ldexp(1.0, np.frexp(values)[1] - 1 - DTYPES[dtype][1])


def located(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with real paths."""
    found = {**recipe, "models": [{**entry} for entry in recipe["models"]]}
    for entry in (found, *found["models"]):
        for key in {"model", "base_model"} & set(entry):
            entry[key] = str(folder / entry[key])
    return found


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one, other)[0, 1])


# Predicted and measured


def predictions(scratch: Path, size: str) -> list[dict[str, Any]]:
    """Children of two parents, for each format, size of the deltas, and kinship of the parents."""
    rows: list[dict[str, Any]] = []
    for stored, dtype in FORMATS:
        for spread in SIZES:
            for kinship in KINSHIPS:
                folder = scratch / f"{stored}-{spread}-{kinship}"
                make_family(folder, size, "ab", spread=spread, kinship=kinship, dtype=stored)
                label = dtype if stored == dtype else f"{stored} to {dtype}"
                rows.append({"format": label, "size": spread} | prediction(folder, dtype))
                shutil.rmtree(folder)
    return rows


def prediction(folder: Path, dtype: str) -> dict[str, Any]:
    """Kinship of the child 0.6 a + 0.4 b with a."""
    base, a, b = (open_checkpoint(folder / name) for name in ("base", "a", "b"))
    recipe = weighted("linear", {"a": 0.6, "b": 0.4}) | {"dtype": dtype}
    lineage = Lineage(measure(base, [a, b]))
    lineage.add("child", recipe, base="base")
    Native().merge(located(recipe, folder), folder / "child")
    measured = measure(base, [a, b, open_checkpoint(folder / "child")])
    found, expected = (
        kinship_from(stats, base="base", total_parameters=1)
        for stats in (lineage.statistics(), measured)
    )
    noise = float((ulp(weights(folder / "child"), dtype) ** 2).sum() / 12)
    square = float(lineage.whole.gram_TNN[0, 2, 2])
    predicted = float(found.pcc_NN[0, 2])
    return {
        "parents": float(found.pcc_NN[0, 1]),
        "predicted": predicted,
        "measured": float(expected.pcc_NN[0, 2]),
        "expected": predicted / np.sqrt(1 + noise / square),
        "noise": float(np.sqrt(noise / square)),
    }


# Lineages


def lineages(scratch: Path, size: str, generations: int) -> dict[str, list[dict[str, Any]]]:
    """Each generation of each lineage, made in three ways."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number, (label, (kept, recipe_of)) in enumerate(LINEAGES.items()):
        folder = scratch / f"lineage-{number}"
        make_family(folder, size, FOUNDATIONS, spread=SPREAD, kinship=0.5, dtype="bfloat16")
        found[label] = lineage_rows(folder, recipe_of, kept, generations)
        shutil.rmtree(folder)
    return found


def lineage_rows(
    folder: Path, recipe_of: Callable[[str, str], dict[str, Any]], kept: float, generations: int
) -> list[dict[str, Any]]:
    """How far each generation is from the truth, by each way to make it."""
    base, *models = (open_checkpoint(folder / name) for name in ("base", *FOUNDATIONS))
    lineage = Lineage(measure(base, models))
    vectors = {name: weights(folder / name) for name in ("base", *FOUNDATIONS)}
    counts = [base.tensors[name].count for name in sorted(base.tensors)]
    engines = {"native": Native(), "mergekit": Mergekit({"copy_tokenizer": False})}
    for engine in engines:
        (folder / engine).mkdir()
        for name in ("base", *FOUNDATIONS):
            (folder / engine / name).symlink_to(folder / name)
    elder, rows = "a", []
    for generation in range(1, generations + 1):
        child, other = f"{generation}", FOUNDATIONS[generation % len(FOUNDATIONS)]
        recipe = recipe_of(elder, other)
        lineage.add(child, recipe, base="base")
        for engine, merger in engines.items():
            merger.merge(located(recipe, folder / engine), folder / engine / child)
        flat = lineage.flat(child)
        in_order = np.argsort(flat.tensors)
        c_TK = np.column_stack([flat.base_T, flat.model_TN])[in_order]
        truth = sum(
            np.repeat(c_TK[:, k], counts) * vectors[name]
            for k, name in enumerate(("base", *flat.models))
        )
        at_once = flat_recipe(
            flat,
            {name: str(folder / name) for name in FOUNDATIONS},
            base=str(folder / "base"),
            donor="a",
            dtypes={"dtype": "bfloat16"},
        )
        engines["native"].merge(at_once, folder / "flat" / child)
        made = {way: weights(folder / way / child) for way in ("flat", *engines)}
        change, parent = truth - vectors["base"], vectors["a"] - vectors["base"]
        once = float(np.linalg.norm(ulp(truth, "bfloat16")) / np.linalg.norm(change) / np.sqrt(12))
        rows.append(
            {
                "generation": generation,
                "expected once": once,
                # Each generation keeps a part of the errors of those before it, and adds its own.
                "expected each": once
                * np.sqrt(sum(kept ** (2 * age) for age in range(generation))),
                "distance": {
                    way: float(np.linalg.norm(one - truth) / np.linalg.norm(change))
                    for way, one in made.items()
                },
                "kinship": {
                    way: correlation(one - vectors["base"], parent) - correlation(change, parent)
                    for way, one in made.items()
                },
                "differ": float(np.mean(made["native"] != made["flat"])),
            }
        )
        elder = child
    return rows


# Methods


def methods(scratch: Path, size: str) -> dict[str, dict[str, float]]:
    """Each method's child by mergekit against the native one, in bfloat16."""
    folder = scratch / "methods"
    make_family(folder, size, "abc", spread=SPREAD, kinship=0.5, dtype="bfloat16")
    found: dict[str, dict[str, float]] = {}
    for number, (method, recipe) in enumerate(METHODS.items()):
        recipe = located(recipe, folder) | {"out_dtype": "bfloat16"}
        children: dict[str, np.ndarray] = {}
        for way, computed in {"native": "float64", "own": "bfloat16", "wide": "float32"}.items():
            out = folder / f"{number}-{way}"
            engine = Native() if way == "native" else Mergekit({"copy_tokenizer": False})
            engine.merge(recipe | {"dtype": computed}, out)
            children[way] = weights(out)
        Mergekit({"copy_tokenizer": False}).merge(
            recipe | {"dtype": "float64", "out_dtype": "float64"}, folder / f"{number}-truth"
        )
        truth = weights(folder / f"{number}-truth")
        step = ulp(truth, "bfloat16")
        found[method] = {
            f"{way} within": float(np.mean(np.abs(children[way] - children["native"]) <= step))
            for way in ("own", "wide")
        } | {
            f"{way} error": float(np.linalg.norm(one - truth) / np.linalg.norm(step))
            for way, one in children.items()
        }
    return found


# Output


def show(found: Mapping[str, Any]) -> None:
    print("Kinship (PCC) of 0.6 a + 0.4 b with a\n")
    print("| format | delta | parents | predicted | measured | expected | rounding / delta |")
    print("|---|---|---|---|---|---|---|")
    for row in found["predictions"]:
        print(
            f"| {row['format']} | {row['size']:g} | {row['parents']:.4f} | {row['predicted']:.6f} "
            f"| {row['measured']:.6f} | {row['expected']:.6f} | {row['noise']:.2g} |"
        )
    for label, rows in found["lineages"].items():
        print(f"\nLineage: {label}\n")
        print("| generation | ulp²/12 once | flat | ulp²/12 each | natively | by mergekit ", end="")
        print("| kinship flat | natively | by mergekit | weights that differ |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            ways = ("flat", "native", "mergekit")
            flat, *stepwise = (f"{row['distance'][way]:.4f}" for way in ways)
            errors = " | ".join(f"{row['kinship'][way]:+.5f}" for way in ways)
            print(
                f"| {row['generation']} | {row['expected once']:.4f} | {flat} "
                f"| {row['expected each']:.4f} | {' | '.join(stepwise)} | {errors} "
                f"| {row['differ']:.1%} |"
            )
    print("\nmergekit against native, in bfloat16\n")
    print("| method | within one unit | told float32 | error, native | mergekit | told float32 |")
    print("|---|---|---|---|---|---|")
    for method, row in found["methods"].items():
        print(
            f"| {method} | {row['own within']:.2%} | {row['wide within']:.4%} "
            f"| {row['native error']:.3f} | {row['own error']:.3f} | {row['wide error']:.3f} |"
        )


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Kinship lost to rounding by the deltas' size, and distance from the truth by generation."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "modelkin", "font.size": 9}
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    for label, colour in {"bfloat16": "#b4452f", "float32 to bfloat16": "#2f6db4"}.items():
        rows = [
            row for row in found["predictions"] if row["format"] == label and row["parents"] < 0.3
        ]
        size = [row["size"] for row in rows]
        off = [abs(row["measured"] / row["predicted"] - 1) for row in rows]
        left.plot(size, off, "o", color=colour, label=f"{label}, measured", ms=5)
        if label != "bfloat16":
            expected = [1 - row["expected"] / row["predicted"] for row in rows]
            left.plot(size, expected, color=colour, label="independent noise, ulp²/12", lw=1)
    left.set(xscale="log", yscale="log", xlabel="standard deviation of the delta (weights: 0.02)")
    left.set(ylabel="|measured / predicted kinship - 1|")
    colours = ("#b4452f", "#c78a1f", "#2f6db4")
    for (label, rows), colour in zip(found["lineages"].items(), colours, strict=True):
        generation = [row["generation"] for row in rows]
        for way, style in {"native": "-", "flat": "--", "mergekit": ":"}.items():
            distance = [row["distance"][way] for row in rows]
            right.plot(generation, distance, style, color=colour, label=f"{label}: {way}")
    right.set(xlabel="generation", ylabel="distance from the truth / norm of the delta", ylim=0)
    for axes, columns in ((left, 1), (right, 2)):
        axes.legend(
            frameon=False,
            fontsize=7,
            loc="upper center",
            ncols=columns,
            bbox_to_anchor=(0.5, -0.16),
        )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller models")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/rounding.json"))
    parser.add_argument("--figure", type=Path, help="where to draw, as SVG")
    chosen = parser.parse_args()
    size = "tiny" if chosen.quick else "4M"
    with tempfile.TemporaryDirectory(prefix="modelkin-") as scratch:
        os.environ["MODELKIN_CACHE"] = str(Path(scratch) / "cache")
        found = {
            "versions": {name: version(name) for name in ("modelkin", "mergekit", "numpy")},
            "parameters": sum(int(np.prod(shape)) for _, shape in tensor_shapes(size)),
            "predictions": predictions(Path(scratch), size),
            "lineages": lineages(Path(scratch), size, GENERATIONS),
            "methods": methods(Path(scratch), size),
        }
    chosen.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    show(found)
    if chosen.figure:
        draw(found, chosen.figure)


if __name__ == "__main__":
    main()
