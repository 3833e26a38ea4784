"""The reader behind `make cuda-compile`: what it finds in cuobjdump's text, what fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_kernels import EXPECTED, failures
from machine_code import Kernel, count_instructions, read_usage, short_name
from toolchain import MissingToolError, find_toolchain

USAGE = """
Fatbin elf code:
================
arch = sm_80
code version = [1,7]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fv:
  REG:24 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:424 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
 Function _Z1fv:
  REG:168 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:424 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """
Fatbin elf code:
================
arch = sm_80
\tcode for sm_80
\t\tFunction : _Z1fv
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;               /* 0x00000a0000017a02 */
                                                                        /* 0x000fe40000000f00 */
        /*0a30*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R10, R4 ; /* 0x000 */
        /*0a40*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ; /* 0x000 */
        /*0a50*/              @P3  STL [R1+0x4], R7 ;                   /* 0x000 */
        /*0a60*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;          /* 0x000 */
Fatbin elf code:
================
arch = sm_90a
\t\tFunction : _Z1fv
        /*0000*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x */
"""


def test_usage_and_instructions_are_counted_per_architecture() -> None:
    kernels = read_usage(USAGE.splitlines())
    count_instructions(SASS.splitlines(), kernels)
    assert set(kernels) == {("_Z1fv", "sm_80"), ("_Z1fv", "sm_90a")}
    old, new = kernels["_Z1fv", "sm_80"], kernels["_Z1fv", "sm_90a"]
    assert (old.registers, old.stack, old.shared) == (24, 8, 1024)
    assert (new.registers, new.stack, new.shared) == (168, 0, 0)
    assert old.count("HMMA") == 2
    assert old.count("LDL", "STL") == 1
    assert old.count("UIADD3") == 1
    assert (new.count("HGMMA"), new.count("HMMA")) == (1, 0)


def complete() -> dict[tuple[str, str], Kernel]:
    """Return kernels in which the check finds no fault."""
    named = {}
    for arch, (plain, products, instruction) in EXPECTED.items():
        for name in plain:
            named[arch, name] = Kernel(name, arch, 32, 0, 0, 0, {"STG": 1})
        for name in products:
            named[arch, name] = Kernel(name, arch, 200, 0, 0, 0, {instruction: 64, "STG": 1})
    return named


def test_complete_machine_code_has_no_failures() -> None:
    assert failures(complete(), {"sm_100"}) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"counts": {"STG": 1}}, "sm_80: attention_kernel<64> has no HMMA"),
        ({"counts": {"HMMA": 1}}, "sm_80: attention_kernel<64> stores nothing"),
        ({"stack": 16}, "sm_80: attention_kernel<64> uses local memory (spilled registers)"),
        (
            {"counts": {"HMMA": 1, "STG": 1, "LDL": 1}},
            "sm_80: attention_kernel<64> uses local memory (spilled registers)",
        ),
        ({"registers": -1}, "sm_80: attention_kernel<64>: no resource usage"),
    ],
)
def test_a_failure_names_kernel_and_reason(change: dict[str, object], sentence: str) -> None:
    named = complete()
    for field, value in change.items():
        setattr(named["sm_80", "attention_kernel<64>"], field, value)
    assert failures(named, {"sm_100"}) == [sentence]


def test_missing_and_unknown_kernels_and_missing_ptx_are_failures() -> None:
    named = complete()
    named["sm_90a", "new_kernel"] = named.pop(("sm_90a", "gemm_hopper_128x256<float>"))
    assert failures(named, set()) == [
        "sm_90a: gemm_hopper_128x256<float> is missing",
        "sm_90a: new_kernel is not in the list",
        "no PTX of sm_100 (there is: none)",
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void flowprefill::(anonymous namespace)::attention_kernel<64>(flowprefill::X)",
         "attention_kernel<64>"),
        ("void flowprefill::(anonymous namespace)::rope_kernel<unsigned short>(flowprefill::X)",
         "rope_kernel<bf16>"),
        ("flowprefill::(anonymous namespace)::embed_kernel(flowprefill::X)", "embed_kernel"),
        ("void K<a::GemmShape<64, 32, 16>, BiasElementwise<cutlass::bfloat16_t, float>>(b)",
         "gemm_ampere_64x32<bf16>"),
        ("void K<a::GemmShape<64, 32, 16>, GatedStore<Map<a::GemmShape<64, 32, 16>>>>(c)",
         "gemm_gated_ampere_64x32"),
        ("PrefillWithKVCacheKernel<HopperTraits<64>, true, true, TileScheduler>(c)",
         "attention_hopper<64, window>"),
        ("a::PrefillWithKVCacheKernel<KernelTraits<false, 128, BaseTwoScores<true> >, X>(c)",
         "attention_hopper"),
        ("PrefillWithKVCacheKernel<HopperTraits<128, BaseTwoScores<true> >, X>(c)",
         "attention_hopper<128, cap>"),
        ("void K<CollectiveMma<cute::C<128>, cute::C<256>, cute::C<64> >, ColBias<float>>(b)",
         "gemm_hopper_128x256<float>"),
    ],
)  # fmt: skip
def test_names_become_readable(name: str, short: str) -> None:
    assert short_name(name) == short


def fake_toolchain(root: Path) -> None:
    for path in (
        "bin/nvcc",
        "include/cuda_runtime_api.h",
        "lib/libcudart_static.a",
        "bin/cuobjdump",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_cuda_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_toolchain(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tools = find_toolchain()
    assert tools.nvcc == tmp_path / "bin" / "nvcc"
    assert tools.cudart == tmp_path / "lib" / "libcudart_static.a"
    assert tools.environment()["CUDA_HOME"] == str(tmp_path)
    assert tools.environment()["PATH"].split(":")[1:3] == [str(tmp_path / "bin")] * 2


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain._roots", lambda: [Path("/nowhere")])
    with pytest.raises(MissingToolError, match=r"no nvcc .* /nowhere: .* nvidia-cuda-nvcc==13"):
        find_toolchain()
