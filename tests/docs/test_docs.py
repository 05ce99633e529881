"""The README and docs/: code blocks run, links lead somewhere, messages and numbers are those of the package."""

import os
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adamw_triton import AdamW, launch
from bench import docs

ROOT = docs.ROOT
PAGES = [name for name in docs.pages() if not name.startswith("bench")]
FRAMEWORKS_PAGE = "docs/frameworks.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")
# Sections of that page that have code, and the package that it needs.
FRAMEWORKS = {
    "Hugging Face Trainer": "transformers",
    "Accelerate": "accelerate",
    "Lightning": "lightning",
    "timm": "timm",
    "torchtitan": "torchtitan",
}


def text_of(name):
    return (ROOT / name).read_text()


def section_of(page, heading):
    return text_of(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]


def small_model():
    return nn.Sequential(nn.Linear(128, 16), nn.GELU(), nn.Linear(16, 4))


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def as_without_a_gpu(monkeypatch):
    """The eager step: the interpreter is slow on whole models."""
    monkeypatch.setattr(launch, "has_kernels", lambda device: False)


def names_for(page, tmp_path):
    """What the blocks of a page take for granted; the README's are complete."""
    if page == "README.md":
        return {}
    names = {
        "torch": torch, "AdamW": AdamW, "model": small_model(), "inputs": torch.randn(2, 128),
        "bf16_model": small_model().to(torch.bfloat16),
    }  # fmt: skip
    if page == "docs/distributed.md":
        import torch.distributed.checkpoint as dcp
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        layers = small_model()
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("pp",))
        names |= {"fully_shard": fully_shard, "dcp": dcp, "dist": dist, "os": os, "mesh": mesh, "stage": small_model()}
        names |= {"step": 1, "folder": str(tmp_path), "state": {"weight": torch.zeros(2)}}
        names["model"] = layers
        layers.layers = [layers[0], layers[2]]
    return names


@pytest.mark.filterwarnings("default")  # of the frameworks
@pytest.mark.parametrize("section", FRAMEWORKS)
def test_code_for_a_framework_runs(section, tmp_path, monkeypatch):
    pytest.importorskip(FRAMEWORKS[section], reason="comes with the extra `examples`, or, timm, by itself")
    (block,) = BLOCK.findall(section_of(FRAMEWORKS_PAGE, section))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, f"{FRAMEWORKS_PAGE}, {section}", "exec"), names_for(FRAMEWORKS_PAGE, tmp_path))


def test_no_code_for_a_framework_is_left_out():
    in_sections = [len(BLOCK.findall(section_of(FRAMEWORKS_PAGE, section))) for section in FRAMEWORKS]
    assert sum(in_sections) == len(BLOCK.findall(text_of(FRAMEWORKS_PAGE)))


@pytest.mark.fast
@pytest.mark.filterwarnings("default")  # of torch.compile
@pytest.mark.parametrize("page", [page for page in PAGES if page != FRAMEWORKS_PAGE])
def test_code_blocks_run(page, tmp_path, monkeypatch, request):
    blocks = BLOCK.findall(text_of(page))
    if page == "docs/distributed.md":
        request.getfixturevalue("one_rank")
    monkeypatch.chdir(tmp_path)
    names = names_for(page, tmp_path)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(text_of(page)):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {path}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {path}{anchor}"


def test_files_that_the_tests_readme_names_are_there():
    named = set(re.findall(r"`([a-z_]+/)?(test_[a-z_0-9]+\.py)", text_of("tests/README.md")))
    assert len(named) > 20
    assert [f"{folder}{name}" for folder, name in named if not (ROOT / "tests" / folder / name).exists()] == []


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 150


def test_no_page_is_left_out():
    """Each is linked from the README."""
    linked = {path for path, _ in LINK.findall(text_of("README.md"))}
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


# What pages say about the package


def messages_of(page):
    """What stands in quotes in the first column of a page's tables."""
    return re.findall(r'^\| "([^"]+)"', text_of(page), re.MULTILINE)


def sources():
    """The package's strings as they are joined when it runs."""
    source = "".join(path.read_text() for path in sorted((ROOT / "adamw_triton").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", source)


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/distributed.md"])
def test_messages_are_the_packages(page):
    found = messages_of(page)
    assert len(found) >= 7
    source = re.sub(r"\{[^{}]*\}", "…", sources())
    for message in found:
        wanted = message.replace("master_weight_bits=32 is", "master_weight_bits=… is")
        for part in wanted.split("…"):
            assert part.strip() in source, f"{page}: {message}"


def rows_of(page, heading):
    """Rows of the table that follows a heading, as lists of cells."""
    lines = [line for line in section_of(page, heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.fast
@pytest.mark.parametrize("row", rows_of("README.md", "Which storage?"), ids=lambda row: row[0])
def test_bytes_of_state(row):
    """The README's bytes for each parameter are those of a large model with these options."""
    you_have, options, expected = row
    given = re.search(r"`([^`]*)`", options)
    dtype = torch.bfloat16 if you_have.startswith("bf16") else torch.float32
    param = nn.Parameter(torch.zeros(512, 1024, dtype=dtype))
    param.grad = torch.zeros_like(param)
    optimizer = AdamW([param], **eval(f"dict({given[1]})" if given else "{}"))
    optimizer.step()
    held = optimizer.state_bytes().total - optimizer.state[param]["step"].element_size()
    assert f"{held / param.numel():.2f}".rstrip("0").rstrip(".") == expected


@pytest.mark.fast
def test_every_option_is_in_the_readme():
    import inspect

    ours = set(inspect.signature(AdamW).parameters) - set(inspect.signature(torch.optim.AdamW).parameters)
    text = text_of("README.md")
    assert {name for name in ours if f"`{name}" not in text and f"{name}=" not in text} == set()


def test_accuracy_that_the_readme_tells():
    """Of the update, with bf16 and 8-bit moments, at the default β₂."""
    rows = rows_of("docs/accuracy.md", "The update")
    assert "| m and v | bytes | error, β₂ 0.95 | error, β₂ 0.999 |" in text_of("docs/accuracy.md")
    errors = {row[0]: row[3] for row in rows}
    bf16, eight_bit = (float(errors[name].split()[0]) for name in ("bf16", "adamw_triton 8-bit, stochastic"))
    assert f"{bf16:.1f} % instead of {eight_bit:.1f} %" in text_of("README.md")


def test_bash_blocks_are_those_of_ci():
    """Both commands from a fresh clone run in .ci/run, which takes them from the README."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text_of("README.md"), re.MULTILINE | re.DOTALL)
    from_clone = [block for block in blocks if block.startswith("python -m venv")]
    assert len(from_clone) == 2
    script = (ROOT / ".ci" / "run").read_text()
    for part in (".[bench]", ".[test]"):
        assert f"command_with '{part}'" in script and sum(part in block for block in from_clone) == 1
