"""The code of the README and of the guides runs, and the table of ops is the table of backends."""

import re
import socket
from pathlib import Path

import pytest

from evad.data import Synthetic, synthetic
from evad.data.actors import ACTIONS
from evad.recipe import read_run
from evad.training import prepare
from evad_kernels import _backend

ROOT = Path(__file__).parents[1]
README = ROOT.joinpath("README.md").read_text()
BLOCKS = {
    f"{path.stem} {number}": code
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
}


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs_without_a_network(block, monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a guide must need no download, but this one connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    exec(compile(BLOCKS[block], block, "exec"), {"__name__": "guide"})


def test_configuration_for_ones_own_data_reads_what_evad_writes(tmp_path, monkeypatch, recwarn):
    """``python -m evad.data FOLDER`` writes what the YAML names."""
    (tmp_path / "own.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    for split in ("train", "val"):
        synthetic.write(Synthetic(split, clips=2, size=(32, 48), fresh=False), tmp_path)
    monkeypatch.chdir(tmp_path)
    _, clips, held_out = prepare(read_run("own.yaml"))
    for made in (clips, held_out):
        assert made.labels == ACTIONS and len(made) == 2 and made.flip == 0
        assert made[0].key[1] == synthetic.KEYFRAME and made[0].clip.shape == (3, 16, 224, 336)
    assert not recwarn.list


def test_guides_are_linked_and_their_links_exist():
    guides = sorted(ROOT.glob("docs/*.md"))
    assert guides and all(f"docs/{path.name}" in README for path in guides)
    for path in guides:  # a title, and then whom it is for
        assert re.match(r"# .+\n\nFor ", path.read_text()), path.name
    for path in (ROOT / "README.md", *guides):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


def test_ops_table_is_the_backends_table():
    rows = re.findall(r"^\| `(\w+)` \| .*" + 3 * r" \| (yes|after a trial|)" + r" ?\|$", README, re.MULTILINE)
    assert {op for op, *_ in rows} == set(_backend.IMPLEMENTED)
    for op, *cells in rows:
        for backend, cell in zip(("cpu", "triton", "cuda"), cells, strict=True):
            on_trial = (op, backend) in _backend.ON_TRIAL
            expected = "" if backend not in _backend.IMPLEMENTED[op] else "after a trial" if on_trial else "yes"
            assert cell == expected, (op, backend)
