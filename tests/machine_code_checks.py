"""What holds for the machine code of every kernel."""

from collections import Counter

import triton

from bench.codegen.variants import KERNELS, TARGETS

# Numbers of instructions that tests name are of this version's code, and are checked with it alone.
IS_COUNTED_VERSION = triton.__version__.startswith("3.7.")


def targets_and_kernels(index):
    """What to compile one of several policies for: on sm_90 both kernels, on other targets one, in turns."""
    others = [target for target in TARGETS if target != "sm_90"]
    in_turns = [(target, KERNELS[(index + i) % 2]) for i, target in enumerate(others)]
    return [("sm_90", kernel) for kernel in KERNELS] + in_turns


def assert_nothing_but_global_memory(code, calls_allowed=False):
    assert code.spills == code.local_bytes == 0
    assert code.shared_accesses == code.shared_bytes == code.barriers == 0
    assert code.calls == 0 or calls_allowed


def assert_each_byte_once(variant, code):
    assert sum(code.loads) == code.elements * sum(variant.read_widths)
    assert sum(code.stores) == code.elements * sum(variant.written_widths)


def assert_wide(variant, code):
    """128 bits for the widest tensors, and for narrower ones what the same elements take: 64."""
    widest = max(variant.read_widths)

    def expected(widths):
        counts = Counter()
        for width in widths:
            counts[16 * width // widest] += code.elements * widest // 16
        return counts

    assert Counter(code.loads) == expected(variant.read_widths)
    assert Counter(code.stores) == expected(variant.written_widths)
