"""Numbers on paper, by hand; and that the page says what the functions give."""

import pytest
import torch

from bench import docs, paper, records, shapes
from bench.paper import CLUSTERS, STORAGES

BY_NAME = {storage.name.split(", ", 1)[1]: storage for storage in STORAGES if not storage.name.startswith("torch")}
TORCH, FP32, REMAINDER16, TWELVE_BYTES = STORAGES


def test_parameters_are_those_published():
    large = shapes.llama3_405b()
    assert (len(large), shapes.elements(large)) == (126 * 9 + 3, 405_853_388_800)
    seventy, four_hundred = CLUSTERS
    # 64 divides every first dimension; 1024 does all but the vocabulary of 128256, of which the first has 126 rows.
    assert paper.shard_elements(seventy) * 64 == 70_553_706_496
    without = 405_853_388_800 - 2 * 128256 * 16384
    assert paper.shard_elements(four_hundred) == without // 1024 + 2 * 126 * 16384


@pytest.mark.parametrize(
    ("storage", "held", "moved", "clip"),
    [
        (TORCH, (4, 4, 4 + 4), 4 * 4 + 3 * 4, 4 + 4 + 4),  # the norm reads, scaling reads and writes
        (FP32, (4, 4, 4 + 4), 4 * 4 + 3 * 4, 4),
        (REMAINDER16, (2, 2, 4 + 4 + 2), (2 + 2 + 10) + (2 + 10), 2),
        (TWELVE_BYTES, (2, 2, 1 + 1 + 1 + 8 / 128), (2 + 2 + 3 + 8 / 128) + (2 + 3 + 8 / 128), 2),
    ],
    ids=lambda value: value.name if isinstance(value, paper.Storage) else None,
)
def test_a_gpu_by_hand(storage, held, moved, clip):
    parameters = 10**9
    made = paper.row(storage, parameters)
    assert (made.parameters, made.gradients, made.state) == pytest.approx(held)  # GB, as bytes of each of 1e9
    assert made.memory == pytest.approx(sum(held))
    assert made.step == pytest.approx(moved * 1e9 / 3.35e12 * 1e3)
    assert made.clipped == pytest.approx((moved + clip) * 1e9 / 3.35e12 * 1e3)


def test_both_of_torchs_rows_are_read_off_the_table():
    """70.55e9 / 64 parameters: 16 bytes of each are 17.64 GB, and 28 of each take 9.21 ms at 3.35 TB/s."""
    headings, rows = paper.cluster_table(CLUSTERS[0])
    assert headings == ["Llama 3 70B on 64 GPUs", "parameters, GB", "gradients", "state", "together", "step, ms",
                        "with clipping"]  # fmt: skip
    assert rows[0] == [TORCH.name, "4.41", "4.41", "8.82", "17.64", "9.21", "13.16"]
    assert "step: 1,102,401,664 × 28 B / 3.35e12 B/s = 9.21 ms" in paper.arithmetic(CLUSTERS[0])


def test_the_page_has_these_tables():
    """Between its markers; `test_pages_agree_with_the_committed_results` compares every page with its results."""
    page = (docs.ROOT / "docs" / "distributed.md").read_text()
    blocks = {match[2]: match[4] for match in docs.BLOCK.finditer(page)}
    assert blocks["paper"] == docs.on_paper()
    assert docs.rewritten(page) == page


def test_pages_are_rewritten_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    spread = {"p20": 1.0, "median": 2.0, "p80": 3.0, "n": 3}
    found = [
        {
            "command": "dist", "case": case, "provider": provider, "tensors": tensors,
            "host_us": {**spread, "median": us}, "times_torch_fused": 6000.0 / us, **counts,
            "times_torch_fused_cold": 3000.0 / us,
        }
        for case, tensors in (("llama-3-8b", 291), ("llama-3-70b", 723))
        for provider, us, counts in (
            ("adamw_triton", 500.0, {"all_reduces": 0, "launches": 2}), ("torch fused", 6000.0, {}),
        )
    ] + [
        {
            "command": "cpu", "case": "resnet-50, fp32", "provider": "adamw_triton fp32", "wall_ms": spread,
            "this_over_torch_fused": 1.1,
        },
    ]  # fmt: skip
    records.write(tmp_path / "result.json", "dist", [], torch.device("cpu"), found)
    (tmp_path / "docs").mkdir()
    pages = {
        "README.md": "a\n<!-- table cpu result.json -->\n<!-- end -->\n",
        "docs/distributed.md": "b\n<!-- table dist result.json -->\n<!-- end -->\n<!-- table paper -->\n<!-- end -->\n",
    }
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    assert docs.main(["--check"]) == 1
    assert capsys.readouterr().out.count("does not agree") == 2
    assert docs.main([]) == 0 and docs.main(["--check"]) == 0
    page = (tmp_path / "docs/distributed.md").read_text()
    assert "| adamw_triton | 500 | 12.0 | 6.0 | 500 | 12.0 | 6.0 | 0 | 2 |" in page
    assert "| torch fused | 6,000 | 1.0 | 0.5 | 6,000 | 1.0 | 0.5 |  |  |" in page and "17.64" in page
    assert "| resnet-50, fp32 | adamw_triton fp32 | 2.0 | 1.10 |" in (tmp_path / "README.md").read_text()

    (tmp_path / "docs/distributed.md").write_text(page.replace("17.64", "17.65"))
    assert docs.main(["--check"]) == 1
    assert "docs/distributed.md does not agree" in capsys.readouterr().out
