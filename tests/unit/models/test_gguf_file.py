"""GGUF files: tiny ones written here, the embedded SmolLM2, and damaged ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_files import TINY, TinyGguf
from transformers.initialization import no_init_weights

from flowprefill.errors import CheckpointError
from flowprefill.models.checkpoint import Checkpoint, open_checkpoint
from flowprefill.models.families.gemma import read_gemma2_gguf
from flowprefill.models.gguf_metadata import GgufMetadata
from flowprefill.models.model_config import rope_inverse_frequencies
from flowprefill.models.weight_names import hf_name

Make = Callable[..., TinyGguf]
REFERENCE = Path(__file__).parents[4] / "shared" / "reference" / "smollm2.json"
SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # each example writes anew


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    try:
        return open_checkpoint("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def reference() -> list[dict[str, Any]]:
    if not REFERENCE.is_file():
        pytest.skip(f"no reference outputs at {REFERENCE}")
    prompts: list[dict[str, Any]] = json.loads(REFERENCE.read_text())["prompts"]
    return prompts


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_written_model_reads_back_equal(
    save_tiny: Any, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    _, folder = save_tiny(family, **settings)
    original = open_checkpoint(folder)
    architecture = "llama" if family == "mistral" else family
    read = open_checkpoint(TinyGguf(original, architecture).write(tmp_path / "tiny.gguf"))
    assert read.name == "tiny"
    expected = dict(original.weights())
    weights = dict(read.weights())
    assert list(weights) == list(expected)
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    for name in ("num_heads", "num_kv_heads", "head_dim", "vocab_size", "qkv_bias", "o_bias",
                 "mlp_bias", "qk_norm", "tie_embeddings", "rope_theta"):  # fmt: skip
        assert getattr(read.config, name) == getattr(original.config, name), name


MIXTURE = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
# family -> architecture of its files, and what their header says beyond what all say
MIXTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": ("qwen3moe", {"norm_topk_prob": True}, {"expert_feed_forward_length": 32}),
    "mixtral": ("llama", {}, {}),
    "olmoe": ("olmoe", {"head_dim": 16, "norm_topk_prob": False}, {}),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_read_back_equal(save_tiny: Any, tmp_path: Path, family: str) -> None:
    architecture, settings, keys = MIXTURES[family]
    _, folder = save_tiny(family, **MIXTURE, **settings)
    original = open_checkpoint(folder)
    written = TinyGguf(original, architecture)
    written.metadata |= {"expert_count": 4, "expert_used_count": 2} | keys
    read = open_checkpoint(written.write(tmp_path / "tiny.gguf"))
    told = {
        name: getattr(read.config, name)
        for name in ("family", "bos_token_id", "eos_token_ids", "rms_eps", "max_position")
    }
    assert read.config == replace(original.config, **told)
    expected = dict(original.weights())
    weights = dict(read.weights())
    assert list(weights) == list(expected)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_shared_count", 1),
        ("expert_gating_func", 2),
        ("expert_weights_scale", 2.5),
        ("leading_dense_block_count", 1),
    ],
)
def test_mixtures_that_are_computed_otherwise_are_refused(
    save_tiny: Any, tmp_path: Path, key: str, value: float
) -> None:
    _, folder = save_tiny("qwen3_moe", **MIXTURE)
    written = TinyGguf(open_checkpoint(folder), "qwen3moe")
    written.metadata |= {"expert_count": 4, "expert_used_count": 2, key: value}
    with pytest.raises(CheckpointError, match=rf"qwen3moe.{key}: got {value}"):
        open_checkpoint(written.write(tmp_path / "bad.gguf"))


def test_experts_of_a_family_that_has_none_are_refused(tiny_gguf: Make, tmp_path: Path) -> None:
    written = tiny_gguf("qwen2")
    written.metadata["expert_count"] = 8
    with pytest.raises(CheckpointError, match=r"qwen2.expert_count: got 8, expected 0: no mixture"):
        open_checkpoint(written.write(tmp_path / "bad.gguf"))


GEMMA_KEYS: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3": {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
}


@pytest.mark.parametrize("architecture", GEMMA_KEYS)
def test_gemma_reads_back_equal_with_its_norms_whole(tmp_path: Path, architecture: str) -> None:
    model = tiny_gemma(architecture)
    model.save_pretrained(tmp_path / "hf")
    original = open_checkpoint(tmp_path / "hf")
    written = TinyGguf(original, architecture)
    written.metadata |= {"attention.sliding_window": 16} | GEMMA_KEYS[architecture]
    read = open_checkpoint(written.write(tmp_path / "tiny.gguf"))
    told = {"norm_offset": 0.0} | {
        name: getattr(read.config, name) for name in ("bos_token_id", "eos_token_ids", "rms_eps")
    }
    assert read.config == replace(original.config, **told)
    weights = dict(original.weights())
    for name, tensor in read.weights():
        expected = weights[name].float() + (1.0 if name.endswith("norm") else 0.0)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    assert ("layers.0.q_norm" in weights) is (architecture == "gemma3")


def tiny_gemma(architecture: str) -> transformers.PreTrainedModel:
    settings = TINY | {"query_pre_attn_scalar": 8, "sliding_window": 16, "num_hidden_layers": 7}
    config: transformers.PretrainedConfig
    if architecture == "gemma2":
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
        config = transformers.Gemma2Config(**settings, **caps)
    else:
        config = transformers.Gemma3TextConfig(
            **settings, rope_scaling={"rope_type": "linear", "factor": 8.0}
        )
    torch.manual_seed(7)
    made: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return made


def test_gemmas_of_27_billion_scale_scores_by_their_width(tmp_path: Path) -> None:
    tiny_gemma("gemma2").save_pretrained(tmp_path / "hf")
    written = TinyGguf(open_checkpoint(tmp_path / "hf"), "gemma2")
    metadata = GgufMetadata(written.write(tmp_path / "tiny.gguf"))
    fields = {"num_layers": 46, "num_heads": 32, "hidden_size": 4608, "head_dim": 128}
    assert read_gemma2_gguf(metadata, fields)["attention_scale"] == 144**-0.5
    fields["num_layers"] = 42
    assert read_gemma2_gguf(metadata, fields)["attention_scale"] == 128**-0.5


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_weights_are_close(tiny_gguf: Make, tmp_path: Path, kind: str) -> None:
    written = tiny_gguf("qwen2")
    original = written.tensors["blk.1.ffn_up.weight"]
    written.quantised["blk.1.ffn_up.weight"] = gguf.GGMLQuantizationType[kind]
    weights = dict(open_checkpoint(written.write(tmp_path / "tiny.gguf")).weights())
    error = np.abs(weights["layers.1.up"].numpy() - original).max()
    bits = {"F16": 11, "BF16": 8, "Q8_0": 7}.get(kind, 3)
    assert 0 < error <= np.abs(original).max() * 2.0**-bits


def test_llama3_factors_give_the_llama3_frequencies(
    save_tiny: Any, tiny_gguf: Make, tmp_path: Path
) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    _, folder = save_tiny("llama", rope_scaling=scaling)
    expected, _ = rope_inverse_frequencies(open_checkpoint(folder).config)
    written = tiny_gguf("llama")
    plain, _ = rope_inverse_frequencies(open_checkpoint(folder.parent / "tiny-llama").config)
    written.tensors["rope_freqs.weight"] = (plain / expected).astype(np.float32)
    read = open_checkpoint(written.write(tmp_path / "tiny.gguf"))
    inverse, factor = rope_inverse_frequencies(read.config)
    np.testing.assert_allclose(inverse, expected, rtol=1e-6)
    assert factor == 1.0
    assert not np.allclose(plain, expected)


def test_linear_and_yarn_scaling_are_read(tiny_gguf: Make, tmp_path: Path) -> None:
    written = tiny_gguf("qwen2")
    written.metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    linear = open_checkpoint(written.write(tmp_path / "linear.gguf")).config.rope_scaling
    assert (linear.kind, linear.factor) == ("linear", 2.0)
    written.metadata |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                         "rope.scaling.original_context_length": 32}  # fmt: skip
    config = open_checkpoint(written.write(tmp_path / "yarn.gguf")).config
    assert (config.rope_scaling.kind, config.rope_scaling.original_max_position) == ("yarn", 32)
    theirs = transformers.Qwen2Config(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=128,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    )  # fmt: skip
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"]
    expected, expected_factor = init(theirs, "cpu")
    inverse, factor = rope_inverse_frequencies(config)
    np.testing.assert_allclose(inverse, expected.numpy(), rtol=1e-7)
    assert factor == pytest.approx(expected_factor)


def test_own_header_parser_agrees_with_the_gguf_package(tiny_gguf: Make, tmp_path: Path) -> None:
    path = tiny_gguf("llama").write(tmp_path / "tiny.gguf")
    ours, theirs = GgufMetadata(path), gguf.GGUFReader(path)
    fields = {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert ours.values == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(tensor.shape.tolist())[::-1]
        assert (mine.kind, mine.offset) == (tensor.tensor_type, tensor.data_offset)
        assert mine.size_bytes == tensor.n_bytes


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("expert_count", 8, ["llama.expert_used_count", "None", "int"]),
        ("attention.causal", False, ["llama.attention.causal", "False", "true"]),
        ("rope.scaling.type", "longrope", ["rope.scaling.type", "longrope", "linear or yarn"]),
        ("rope.dimension_count", 4, ["rope.dimension_count", "4", "8"]),
        ("attention.head_count", "four", ["attention.head_count", "four", "int"]),
        ("block_count", 2**30, ["llama.block_count", "1073741824", "1..4096"]),
        ("block_count", 3, ["blk.2.attn_norm.weight", "missing"]),
        ("feed_forward_length", 48, ["ffn_gate.weight", "[40, 32]", "[48, 32]"]),
        ("attention.layer_norm_rms_epsilon", 0.0, ["rms_eps", "0.0", "> 0"]),
    ],
)
def test_bad_metadata_names_the_key(
    tiny_gguf: Make, tmp_path: Path, key: str, value: Any, names: list[str]
) -> None:
    written = tiny_gguf("llama")
    written.metadata[key] = value
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(written.write(tmp_path / "bad.gguf"))
    for name in names:
        assert name in caught.value.message


def test_unsupported_architecture_is_named(tiny_gguf: Make, tmp_path: Path) -> None:
    written = tiny_gguf("llama")
    written.architecture = "granite"
    with pytest.raises(CheckpointError, match=r"general.architecture: got 'granite', expected one"):
        open_checkpoint(written.write(tmp_path / "bad.gguf"))


def test_unsupported_quantisation_names_tensor_and_type(tiny_gguf: Make, tmp_path: Path) -> None:
    written = tiny_gguf("llama")
    written.tensors["blk.0.ffn_up.weight"] = np.zeros((40, 32), np.int32)
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_up.weight: got quantisation I32"):
        open_checkpoint(written.write(tmp_path / "bad.gguf"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(CheckpointError, match="wrong magic"):
        open_checkpoint(path)
    path.write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(16))
    with pytest.raises(CheckpointError, match="version: got 1, expected 2 or 3"):
        open_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        open_checkpoint(path)


def read_everything(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.tokenizer.encode("abc")) > 0
    for _ in checkpoint.weights():
        pass


@pytest.fixture
def good_bytes(tiny_gguf: Make, tmp_path: Path) -> bytes:
    return tiny_gguf("llama").write(tmp_path / "good.gguf").read_bytes()


@settings(max_examples=60, suppress_health_check=SHARED)
@given(part=st.floats(0.0, 1.0, exclude_max=True))
def test_truncation_anywhere_is_a_checkpoint_error(
    good_bytes: bytes, tmp_path: Path, part: float
) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(good_bytes[: int(part * (len(good_bytes) - 32))])
    with pytest.raises(CheckpointError, match=r"short\.gguf"):
        read_everything(path)


@settings(max_examples=150, suppress_health_check=SHARED)
@given(at=st.integers(0, 2600), value=st.integers(0, 255))
def test_changed_header_byte_never_escapes_as_another_error(
    good_bytes: bytes, tmp_path: Path, at: int, value: int
) -> None:
    path = tmp_path / "changed.gguf"
    path.write_bytes(good_bytes[:at] + bytes([value]) + good_bytes[at + 1 :])
    # Nothing to assert but that no other exception comes out: many bytes may have any value.
    with contextlib.suppress(CheckpointError):
        read_everything(path)


def test_smollm2_config(smollm2: Checkpoint) -> None:
    config = smollm2.config
    assert smollm2.name == "smollm2-135m"
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.rope_theta, config.max_position) == (64, 100_000.0, 8192)
    assert config.tie_embeddings
    assert config.eos_token_ids == (2,)


def test_smollm2_prompts_equal_the_reference(
    smollm2: Checkpoint, reference: list[dict[str, Any]]
) -> None:
    assert len(reference) == 3
    for entry in reference:
        message = {"role": "user", "content": entry["prompt"]}
        rendered = smollm2.chat_template.render([message])
        assert rendered == entry["rendered"]
        assert smollm2.tokenizer.encode(rendered, add_special_tokens=False) == entry["input_ids"]
        ids = entry["greedy_ids"]
        assert smollm2.tokenizer.decode(ids, skip_special_tokens=False) == entry["text"]


@pytest.mark.slow
def test_smollm2_weights_reproduce_the_reference_in_transformers(
    smollm2: Checkpoint, reference: list[dict[str, Any]]
) -> None:
    config = smollm2.config
    with no_init_weights():
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size, hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size, num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
                rms_norm_eps=config.rms_eps, rope_theta=config.rope_theta,
                max_position_embeddings=config.max_position, tie_word_embeddings=True,
            )
        ).eval()  # fmt: skip
    model.tie_weights()
    parameters = dict(model.named_parameters())
    entry = reference[0]
    prompt, greedy = entry["input_ids"], entry["greedy_ids"]
    with torch.no_grad():
        for name, tensor in smollm2.weights():
            parameters[hf_name(name)].data = tensor
        logits = model(torch.tensor([prompt + greedy])).logits[0, len(prompt) - 1 : -1]
    # One pass over prompt and answer: every position chooses the next reference token.
    assert logits.argmax(-1).tolist() == greedy
    for token, logit in entry["top10"]:
        assert logits[0, token].item() == pytest.approx(logit, abs=2e-3)
