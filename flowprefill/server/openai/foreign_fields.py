"""Fields of other servers and endpoints that would change the answer; each is refused by name.

Ignoring one would answer something else than was asked for, so it is a 400 unless its value is
neutral: what it is where the client leaves it out. Fields that only tune another one (such as
``dry_base``, which does nothing without ``dry_multiplier``) need no entry. openai_schema's REFUSED
has the fields of our own endpoints' specifications.
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, tuple[Any, ...]]  # name -> its neutral values, besides null

_VLLM: Fields = {
    "detokenize": (True,), "early_stopping": (False,),
    "kv_transfer_params": ({},), "length_penalty": (1,), "logits_processors": ([],),
    "lora_request": (), "media_io_kwargs": ({},), "mm_processor_kwargs": ({},),
    "repetition_detection": (), "return_tokens_as_token_ids": (False,),
    "thinking_token_budget": (), "truncate_prompt_tokens": (), "vllm_xargs": ({},),
}  # fmt: skip
_SGLANG: Fields = {
    "custom_logit_processor": (), "custom_params": ({},), "input_embeds": (), "input_ids": (),
    "logprob_start_len": (-1,), "lora_name": (), "lora_path": (),
    "max_new_tokens": (), "min_new_tokens": (0,), "no_stop_trim": (False,),
    "return_hidden_states": (False,), "sampling_params": ({},), "session_params": ({},),
    "return_logprob": (False,), "stop_regex": ([], ""), "top_logprobs_num": (0,),
}  # fmt: skip
_LLAMA_CPP: Fields = {
    "adaptive_target": (-1,), "dry_multiplier": (0,), "dynatemp_range": (0,), "image_data": ([],),
    "input_extra": ([],), "input_prefix": ("",), "input_suffix": ("",), "lora": ([],),
    "min_keep": (0, 1), "mirostat": (0,), "multimodal_data": ([],), "n_discard": (0,),
    "n_indent": (0,), "n_keep": (0,), "n_predict": (-1,), "n_probs": (0,),
    "penalize_nl": (False,), "post_sampling_probs": (False,), "reasoning_format": ("none", "auto"),
    "repeat_penalty": (1,), "response_fields": ([],), "return_tokens": (False,), "samplers": ([],),
    "t_max_predict_ms": (0, -1), "tfs_z": (1,), "thinking_forced_open": (False,),
    "top_n_sigma": (-1, 0), "typical_p": (1,), "xtc_probability": (0,),
}  # fmt: skip
_TRANSFORMERS: Fields = {
    "adapter_id": (), "bad_words_ids": ([],), "constraints": ([],),
    "decoder_input_details": (False,), "details": (False,), "diversity_penalty": (0,),
    "do_sample": (True,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (), "force_words_ids": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "guidance_scale": (1,), "inputs": (), "max_length": (),
    "max_time": (), "min_length": (0,), "negative_prompt": ("",), "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,), "num_beams": (1,), "num_return_sequences": (1,), "parameters": ({},),
    "penalty_alpha": (0,), "return_full_text": (False,), "sequence_bias": ({},),
    "stop_sequences": ([],), "suppress_tokens": ([],), "top_n_tokens": (0,), "truncate": (),
    "watermark": (False,),
}  # fmt: skip
_OTHERS: Fields = {
    # what the openai client puts into the body itself
    "extra_body": ({},), "extra_headers": ({},),
    # Ollama
    "context": ([],), "format": ("",), "images": ([],), "num_predict": (-1,), "options": ({},),
    "raw": (False,), "system": ("",), "template": ("",), "think": (),
    # Anthropic, Mistral, OpenRouter, OpenAI's responses
    "input": (), "instructions": ("",), "max_output_tokens": (), "max_tokens_to_sample": (),
    "plugins": ([],), "previous_response_id": (), "prompt_mode": (), "random_seed": (),
    "reasoning": (), "safe_prompt": (False,), "thinking": (), "transforms": ([],),
    "truncation": ("disabled",),
    # TensorRT-LLM
    "beam_search_diversity_rate": (0,), "beam_width": (1,), "end_id": (), "lookahead_config": (),
    "top_p_decay": (1,), "top_p_min": (0,),
    # text-generation-webui, TabbyAPI, Aphrodite, KoboldCpp
    "add_bos_token": (), "ban_eos_token": (False,), "banned_strings": ([],), "banned_tokens": ([],),
    "cfg_scale": (1,),
    "character": (), "custom_token_bans": ("", []), "dynamic_temperature": (False,),
    "instruction_template": (), "nsigma": (0,), "preset": (), "rep_pen": (1,), "skew": (0,),
    "smoothing_factor": (0,), "temperature_last": (False,), "tfs": (1,), "token_healing": (False,),
    "top_a": (0,), "truncation_length": (), "typical": (1,),
}  # fmt: skip
FOREIGN: Fields = _VLLM | _SGLANG | _LLAMA_CPP | _TRANSFORMERS | _OTHERS

# Fields of one endpoint, sent to the other.
NOT_OF_COMPLETIONS: Fields = {
    "add_generation_prompt": (True,), "chat_template": (), "chat_template_kwargs": ({},),
    "continue_final_message": (False,), "documents": ([],), "max_completion_tokens": (),
    "messages": ([],), "reasoning_effort": (), "top_logprobs": (0,),
}  # fmt: skip
NOT_OF_CHAT: Fields = {"echo": (False,), "prompt": ("",)}
