"""Pages under docs/ whose Python is run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# page -> what it takes for granted
PAGES = {
    "layers.md": "",
    "balancing.md": """
import torch
from moe import Balancer, ModelConfig, Transformer
model = Transformer(ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6,
    num_experts_per_tok=2, moe_intermediate_size=12, num_nextn_predict_layers=1,
))
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.randint(61, (2, 8))
prompts = [[1, 2, 3], [4, 5, 6]]
""",
    "optimization.md": """
from moe import ModelConfig, Transformer
model = Transformer(ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, attention="gqa",
    n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=12,
))
""",
}
# inductor takes half a minute a graph; it has a test of its own
PRELUDE = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='aot_eager')\n"


def python_of(page: str) -> str:
    """All ```python blocks of a page as one program; other lines are empty, so that line numbers are the page's."""
    lines, inside = [], False
    for line in page.splitlines():
        fence = re.fullmatch(r"```(\w*)", line)
        if fence:
            inside = not inside and fence[1] == "python"
        lines.append(line if inside and not fence else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, tmp_path: Path) -> None:
    """Its blocks in order, in one namespace, in an empty folder; a comment behind a print says what it prints."""
    program = python_of((ROOT / "docs" / page).read_text(encoding="utf-8"))
    if "import transformers" in program or "from transformers" in program:
        pytest.importorskip("transformers", reason="the page shows its models (extra `hf`)")
    code = f"{PRELUDE}{PAGES[page]}\nexec(compile({program!r}, {page!r}, 'exec'), globals())"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^ *print\(.*\)  # (.+)$", program, flags=re.MULTILINE)
    printed = iter(done.stdout.splitlines())
    for comment in said:
        assert comment.endswith("…") or comment in printed  # "…": numbers that differ between machines


def test_blocks_keep_their_lines() -> None:
    """Only Python is run, and an error in it names the line of the page."""
    page = "# Title\n```python\nx = 1\n```\n```console\n$ rm x\n```\n```python\ny = x\n"
    assert python_of(page).splitlines() == ["", "", "x = 1", "", "", "", "", "", "y = x"]
