"""What 8-bit products cost in loss: the quickstart trained in fp32, bf16 and fp8 from the same seeds, and compared.

    python scripts/benchmarks/fp8_loss.py [section.field=value …] [--steps N] [--seeds S …] [--out DIR]

All see the same batches from the same weights. Runs that are complete are not repeated, so it can be cut into pieces.
Prints a table in Markdown: the last evaluation's loss; of each seed the gap of fp8 to bf16, and that of bf16 to fp32,
which tells what rounding as such does; their means and standard errors, and how far seeds lie apart.
"""

import argparse
import statistics
import sys
from pathlib import Path

from moe.config import Recipe, parse_overrides
from moe.rundir import RunDir, read_metrics
from moe.trainer import train

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

PRECISIONS = ("fp32", "bf16", "fp8")


def final_loss(recipe: Recipe) -> float:
    """Train unless that was done; the loss over the validation set after the last step."""
    run = RunDir.named(recipe.run.name, recipe.run.directory)

    def losses() -> list[float]:
        if not run.metrics.is_file():
            return []
        rows = [row for row in read_metrics(run.metrics) if row["train/step"] == recipe.train.max_steps]
        return [row["eval/loss"] for row in rows if "eval/loss" in row]

    if not losses():
        train(recipe)
    return losses()[-1]


def table(found: dict[int, dict[str, float]]) -> str:
    """Losses by seed and precision, as the record has them."""
    lines = ["| seed | fp32 | bf16 | fp8 | bf16 to fp32 | fp8 to bf16 |", "|---|---:|---:|---:|---:|---:|"]
    rows = [
        (
            *(loss[precision] for precision in PRECISIONS),
            loss["bf16"] / loss["fp32"] - 1,
            loss["fp8"] / loss["bf16"] - 1,
        )
        for loss in found.values()
    ]
    columns = list(zip(*rows, strict=True))
    means = tuple(statistics.mean(column) for column in columns)
    for name, (*losses, rounding, gap) in zip([*found, "mean"], [*rows, means], strict=True):
        lines.append(f"| {name} | {' | '.join(f'{loss:.4f}' for loss in losses)} | {rounding:+.2%} | {gap:+.2%} |")
    plain = [loss["bf16"] for loss in found.values()]
    lines.append(f"\nSeeds in bf16 lie {(max(plain) - min(plain)) / min(plain):.2%} apart.")
    if len(rows) > 1:
        rounding, gap = (statistics.stdev(column) / len(rows) ** 0.5 for column in columns[-2:])
        lines.insert(-1, f"| standard error | | | | {rounding:.2%} | {gap:.2%} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    from quickstart_moe import RECIPE

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/fp8-loss", help="folder for the runs")
    parser.add_argument("words", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    found = {}
    for seed in options.seeds:
        words = [f"run.seed={seed}", f"run.directory={options.out}", f"train.max_steps={options.steps}"]
        words += ["train.eval_every_tokens=100000000", *options.words]
        found[seed] = {
            precision: final_loss(
                parse_overrides(RECIPE, [*words, f"run.name=seed{seed}-{precision}", f"train.precision={precision}"])
            )
            for precision in PRECISIONS
        }
    print(table(found))


if __name__ == "__main__":
    main()
