"""Two hundred recipes with nonsense in them: each trains or says one sentence; none hangs or shows a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

Place = Any  # the fixture's class; conftest is not importable by name
MUTATIONS = 200


def test_nonsense_is_one_sentence(place: Place) -> None:
    """Exit 0 without an error, or exit 2 with exactly one that names the mistake; nothing outside the runs' folder."""
    before = {path.name for path in place.folder.parent.iterdir()}
    _, environment = place.command()
    script = Path(__file__).with_name("fuzzed_launches.py")
    done = subprocess.run(
        [sys.executable, str(script), "0", str(MUTATIONS)], env={**os.environ, **environment}, cwd=place.folder,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    endings = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seed"')]
    assert len(endings) == MUTATIONS
    for ending in endings:
        words, said = ending["words"], ending["said"]
        sentences = [line for line in said.splitlines() if line.startswith("error: ")]
        assert ending["code"] in (0, 2), (words, said)
        assert "Traceback" not in said, (words, said)
        assert len(sentences) == (ending["code"] == 2), (words, said)
        assert all(len(sentence) < 700 for sentence in sentences), (words, said)
    refused = [ending for ending in endings if ending["code"] == 2]
    assert len(refused) > MUTATIONS // 4  # nonsense it is
    assert len(refused) < MUTATIONS * 9 // 10  # and some of it trains
    assert {path.name for path in place.folder.parent.iterdir()} == before
