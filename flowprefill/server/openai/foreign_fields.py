"""Fields of other servers and endpoints that would change the answer; each is refused by name.

Ignoring one would answer something else than was asked for, so it is a 400 unless its value is
neutral: what it is where the client leaves it out. HARMLESS are those that change no answer. What
is in no table is refused too, unless the server is told to ignore it (``unknown_fields``).
openai_schema's REFUSED and IGNORED have the fields of our own endpoints' specifications.
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, tuple[Any, ...]]  # name -> its neutral values, besides null

_VLLM: Fields = {
    "detokenize": (True,), "early_stopping": (False,), "ec_transfer_params": ({},),
    "guided_whitespace_pattern": (), "kv_transfer_params": ({},), "length_penalty": (1,),
    "logits_processors": ([],), "logprob_token_ids": ([],), "lora_request": (),
    "media_io_kwargs": ({},), "mm_processor_kwargs": ({},), "repetition_detection": (),
    "return_prompt_text": (False,), "return_tokens_as_token_ids": (False,),
    "thinking_token_budget": (-1,), "truncate_prompt_tokens": (), "vllm_xargs": ({},),
    "watermarking": (False,),
}  # fmt: skip
_SGLANG: Fields = {
    "custom_logit_processor": (), "custom_params": ({},), "images_config": ({},),
    "input_embeds": (), "input_ids": (),
    "logprob_start_len": (-1,), "lora_name": (), "lora_path": (),
    "max_new_tokens": (), "min_new_tokens": (0,), "no_stop_trim": (False,),
    "return_hidden_states": (False,), "return_logprob": (False,), "return_meta_info": (False,),
    "return_prompt_token_ids": (False,), "sampling_params": ({},), "separate_reasoning": (True,),
    "session_params": ({},), "stop_regex": ([], ""), "stream_reasoning": (True,), "task": (),
    "token_ids_logprob": ([],), "top_logprobs_num": (0,),
}  # fmt: skip
_LLAMA_CPP: Fields = {
    "adaptive_target": (-1,), "dry_multiplier": (0,), "dynatemp_range": (0,),
    "generation_prompt": ("",), "grammar_triggers": ([],), "image_data": ([],),
    "input_extra": ([],), "input_prefix": ("",), "input_suffix": ("",), "lora": ([],),
    "min_keep": (0, 1), "mirostat": (0,), "multimodal_data": ([],), "n_cmpl": (1,),
    "n_discard": (0,), "n_indent": (0,), "n_keep": (0,), "n_predict": (-1,), "n_probs": (0,),
    "parse_tool_calls": (True,), "penalize_nl": (False,), "penalty_prompt": (),
    "post_sampling_probs": (False,), "reasoning_budget": (-1,), "reasoning_budget_message": ("",),
    "reasoning_budget_tokens": (-1,), "reasoning_format": ("none", "auto"),
    "reasoning_in_content": (False,),
    "repeat_penalty": (1,), "response_fields": ([],), "return_tokens": (False,), "samplers": ([],),
    "system_prompt": ("",), "t_max_predict_ms": (0, -1), "tfs_z": (1,),
    "thinking_budget_tokens": (-1,), "thinking_forced_open": (False,),
    "top_n_sigma": (-1, 0), "typical_p": (1,), "xtc_probability": (0,),
}  # fmt: skip
_TRANSFORMERS: Fields = {
    "adapter_id": (), "bad_words_ids": ([],), "begin_suppress_tokens": ([],), "constraints": ([],),
    "decoder_input_details": (False,), "details": (False,), "diversity_penalty": (0,),
    "do_sample": (True,), "dola_layers": (), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (), "force_words_ids": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "guidance_scale": (1,), "inputs": (), "max_length": (),
    "max_time": (), "min_length": (0,), "negative_prompt": ("",), "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,), "num_beams": (1,), "num_return_sequences": (1,), "parameters": ({},),
    "penalty_alpha": (0,), "return_full_text": (False,), "sequence_bias": ({},),
    "stop_sequences": ([],), "stop_strings": ([], ""), "suppress_tokens": ([],),
    "tool_prompt": (), "top_n_tokens": (0,), "truncate": (False, "NONE"), "watermark": (False,),
    "watermarking_config": (),
}  # fmt: skip
_OTHERS: Fields = {
    # what the openai client puts into the body itself
    "extra_body": ({},), "extra_headers": ({},),
    # Ollama
    "context": ([],), "format": ("",), "images": ([],), "num_predict": (-1,), "options": ({},),
    "raw": (False,), "system": ("",), "template": ("",), "think": (),
    # Anthropic, Cohere, Mistral, OpenRouter, OpenAI's responses
    "chat_history": ([],), "input": (), "instructions": ("",), "k": (0,), "max_output_tokens": (),
    "max_tokens_to_sample": (), "models": ([],), "p": (1,), "plugins": ([],), "preamble": ("",),
    "previous_response_id": (), "prompt_mode": (), "random_seed": (), "reasoning": (),
    "safe_prompt": (False,), "safety_mode": (), "strict_tools": (False,), "thinking": (),
    "transforms": ([],), "truncation": ("disabled",),
    # Qwen's, Kimi's and Perplexity's services, xAI, Fireworks, Together
    "context_length_exceeded_behavior": ("error",), "disable_thinking": (False,),
    "echo_last": (0,), "enable_code_interpreter": (False,), "enable_search": (False,),
    "prompt_truncate_len": (), "raw_output": (False,), "reasoning_history": (),
    "response_prefix": ("",), "safety_model": (), "search_parameters": (), "thinking_budget": (),
    # LMDeploy, MLX, TensorRT-LLM
    "adapters": (), "beam_search_diversity_rate": (0,), "beam_width": (1,), "end_id": (),
    "lookahead_config": (), "return_context_logits": (False,), "return_generation_logits": (False,),
    "role_mapping": (), "stop_words": ([],), "top_p_decay": (1,), "top_p_min": (0,),
    # text-generation-webui, TabbyAPI, Aphrodite, KoboldCpp
    "add_bos_token": (), "allowed_tokens": ([],), "ban_eos_token": (False,),
    "banned_strings": ([],), "banned_tokens": ([],), "bypass_eos": (False,), "cfg_scale": (1,),
    "character": (), "chat_instruct_command": (), "chat_template_str": (), "continue_": (False,),
    "custom_token_bans": ("", []), "dynamic_temperature": (False,), "dynatemp_max": (0,),
    "dynatemp_min": (0,), "grammar_string": ("",), "instruction_template": (),
    "instruction_template_str": (), "max_context_length": (), "max_tokens_second": (0,),
    "memory": ("",), "mirostat_mode": (0,), "mode": ("instruct",), "nsigma": (0,), "preset": (),
    "prompt_template": (), "regex_pattern": (), "rep_pen": (1,), "sampler_order": ([],),
    "sampler_priority": ([],), "sampler_seed": (-1,), "skew": (0,), "smoothing_factor": (0,),
    "stop_sequence": ([],), "temperature_last": (False,), "template_vars": ({},), "tfs": (1,),
    "token_ban_ranges": ([],), "token_healing": (False,), "top_a": (0,), "truncation_length": (),
    "typical": (1,),
}  # fmt: skip
_OTHERS |= {
    # SillyTavern's word for stop, Azure, NVIDIA, xAI, Groq, OpenRouter
    "custom_stopping_strings": ([], ""), "stopping_strings": ([],), "data_sources": ([],),
    "deferred": (False,), "disable_tool_validation": (False,), "nvext": ({},),
    "return_citations": (False,), "return_images": (False,), "return_related_questions": (False,),
    "return_routed_experts": (False,), "usage": ({}, {"include": False}), "verbose": (False,),
    # What llama.cpp, SGLang and Fireworks would add to the reply
    "perf_metrics_in_response": (False,), "return_cached_tokens_details": (False,),
    "return_progress": (False,), "t_max_prompt_ms": (0, -1), "timings_per_token": (False,),
}  # fmt: skip
FOREIGN: Fields = _VLLM | _SGLANG | _LLAMA_CPP | _TRANSFORMERS | _OTHERS

# They say who asks, where the request goes, what is cached, logged or told of the time, or tune a
# field that is refused itself: dry_base does nothing without dry_multiplier.
HARMLESS = (
    # vLLM, SGLang
    "bootstrap_host", "bootstrap_port", "bootstrap_room", "cache_salt", "data_parallel_rank",
    "extra_key", "log_metrics", "rid",
    # llama.cpp, Ollama
    "adaptive_decay", "cache_prompt", "dry_allowed_length", "dry_base", "dry_penalty_last_n",
    "dry_sequence_breakers", "dynatemp_exponent", "id_slot", "keep_alive", "mirostat_eta",
    "mirostat_tau", "n_cache_reuse", "n_threads", "repeat_last_n", "slot_id", "speculative.n_max",
    "speculative.n_min", "speculative.p_min", "xtc_threshold",
    # transformers, text-generation-webui, KoboldCpp, TabbyAPI
    "dry_range", "genkey", "pad_token_id", "penalty_range", "quiet", "rep_pen_range",
    "rep_pen_slope", "repetition_decay", "repetition_penalty_range", "return_dict",
    "smoothing_curve", "temp_exponent", "use_cache", "use_default_badwordsids",
    # services, gateways and the chats in front of them
    "api_key", "api_version", "caching", "chat_id", "client_id", "conversation_id",
    "custom_llm_provider", "extra_query", "litellm_call_id", "litellm_metadata",
    "litellm_session_id", "litellm_trace_id", "max_retries", "message_id", "num_retries",
    "provider", "request_timeout", "route", "session_id", "tags", "timeout", "trace", "trace_id",
    "user_id", "user_security_context",
)  # fmt: skip

# Fields of one endpoint, sent to the other.
NOT_OF_COMPLETIONS: Fields = {
    "add_generation_prompt": (True,), "chat_template": (), "chat_template_kwargs": ({},),
    "continue_final_message": (False,), "documents": ([],), "enable_thinking": (),
    "max_completion_tokens": (), "messages": ([],), "reasoning_effort": (), "top_logprobs": (0,),
}  # fmt: skip
# Fields of chats that tune what completions refuse, or have nothing of.
OF_CHAT_ALONE = ("include_reasoning", "parallel_tool_calls")
NOT_OF_CHAT: Fields = {"echo": (False,), "prompt": ("",)}
NOT_OF_EMBEDDINGS: Fields = {
    "chat_template_kwargs": ({},), "embd_normalize": (2,), "embed_dtype": ("float32",),
    "embedding_type": ("float",), "endianness": ("native", "little"), "input_type": (),
    "instruction": ("",), "late_chunking": (False,), "messages": ([],), "normalize": (True,),
    "output_dimension": (), "output_dtype": ("float",), "prompt": ("",), "prompt_name": (),
}  # fmt: skip
