"""Every field of a parameter file is accounted for: used, harmless for a stated reason, or refused.

A field that nobody here has heard of refuses a change of naming: a layer without RoPE, a
temperature, a direction of attention must not pass in silence.  Fields with the value null are not
set, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_TRAINING = "used in training only: dropout, initialisation, auxiliary losses"
_OUTPUT = "how the class returns its results"
_GENERATION = "how text is generated from the logits"
_TOKENS = "which tokens mean what; the tokenizer goes along"
_ORIGIN = "where and by what the file was written"
_RUNNING = "how the class computes, not what"
_LABELS = "names of classes; no tensor depends on them"
_SUMMARY = "a head for multiple choice, whose tensors are accounted for themselves"
_SIZES = "a size that follows from others"
_TOWERS = "describes a part by itself, whose tensors are accounted for like all others"
_PREFIX = "the prefix of p-tuning, whose tensors are kept by themselves"

HARMLESS_FIELDS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("attention_dropout", "attn_dropout", "classifier_dropout", "classifier_dropout_prob"),
            *("dropout", "embd_pdrop", "embed_dropout", "embedding_dropout", "hidden_dropout"),
            "hidden_dropout_prob",
            *(
                "resid_pdrop",
                "resid_dropout",
                "residual_dropout",
                "router_dropout",
                "attention_probs_dropout_prob",
            ),
            *("initializer_factor", "initializer_range", "init_std", "initializer_cutoff_factor"),
            *(
                "aux_loss_alpha",
                "router_aux_loss_coef",
                "router_jitter_noise",
                "router_z_loss_coef",
            ),
            *(
                "router_z_loss_coef",
                "output_router_logits",
                "seq_aux",
                "use_aux_loss",
                "layerdrop",
                "z_loss_coef",
            ),
            *("moe_capacity", "moe_use_aux_free", "moe_aux_loss_coef", "z_loss_weight"),
            *("rescale_layer", "gradient_checkpointing", "use_gradient_checkpointing"),
            *("router_entropy_coef", "freeze_router", "freq_allocation_dropout", "attn_pdrop"),
        ),
        _TRAINING,
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"), _OUTPUT
    ),
    **dict.fromkeys(
        (
            *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample"),
            *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
            *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length"),
            *("max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups"),
            *("num_beams", "num_return_sequences", "output_scores", "remove_invalid_values"),
            *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature"),
            *("top_k", "top_p", "typical_p", "use_cache", "cache_implementation"),
            *("task_specific_params", "is_encoder_decoder_generation", "generation_config"),
        ),
        _GENERATION,
    ),
    **dict.fromkeys(
        (
            *("decoder_start_token_id", "sep_token_id", "unk_token_id", "mask_token_id"),
            *("cls_token_id", "tokenizer_class", "prefix", "im_start_id", "im_end_id"),
            *("image_token_id", "video_token_id", "audio_token_id", "image_token_index"),
            *("vision_start_token_id", "vision_end_token_id", "vision_token_id"),
            *("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id"),
            *("boa_token_id", "eoa_token_id", "boa_token_index", "eoa_token_index"),
            *("media_placeholder_token_id", "video_placeholder", "ignore_index"),
            *("im_patch_id", "eod_token_id", "vocab_file", "bos_token", "eos_token", "pad_token"),
            "chat_template",
        ),
        _TOKENS,
    ),
    **dict.fromkeys(
        (
            *("_name_or_path", "name_or_path", "transformers_version", "auto_map", "architectures"),
            *("_commit_hash", "_attn_implementation_autoset", "model_name", "unsloth_fixed"),
            *("unsloth_version", "finetuning_task", "original_architecture", "license"),
        ),
        _ORIGIN,
    ),
    **dict.fromkeys(
        (
            *("_attn_implementation", "attn_implementation", "chunk_size_feed_forward"),
            *("_experts_implementation", "experts_implementation", "flash_attn", "fuse_rms_norm"),
            *("ep_size", "fuse_attn", "fuse_linear", "fuse_rope", "fuse_softmax_mask"),
            *("fuse_swiglu", "fuse_ln", "pretraining_tp", "torchscript", "use_bfloat16"),
            *("use_flash_attention", "use_flash_attn", "use_recompute", "tf_legacy_loss"),
            *("use_sparse_flash_attn", "low_cpu_mem_usage", "tensor_parallel_degree"),
            *("sequence_parallel", "tensor_parallel_output", "pipeline_parallel_degree"),
            *("recompute", "recompute_granularity", "attn_mode", "use_rms_norm_kernel"),
            "enable_moe_fp32_combine",
            *("quantization_config", "compression_ratio", "reorder_and_upcast_attn"),
            "use_unified_vision_chunk",
            *("slow_but_exact", "attention_softmax_in_fp32", "masked_softmax_fusion"),
            *("bias_dropout_fusion", "skip_bias_add", "skip_bias_add_qkv"),
        ),
        _RUNNING,
    ),
    **dict.fromkeys(
        (
            *("summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
            *("summary_type", "summary_use_proj"),
        ),
        _SUMMARY,
    ),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type", "label_names"), _LABELS),
    **dict.fromkeys(
        (
            *("vision_config", "audio_config", "text_config", "vision_feature_layer"),
            *("vision_feature_select_strategy", "projector_hidden_act", "spatial_merge_size"),
            *("multimodal_projector_bias", "image_seq_length", "mm_tokens_per_image"),
            *("downsample_ratio", "vision_soft_tokens_per_image"),
        ),
        _TOWERS,
    ),
    **dict.fromkeys(("pre_seq_len", "prefix_projection"), _PREFIX),
    **dict.fromkeys(
        ("qk_head_dim", "original_max_position_embeddings", "projection_hidden_size"), _SIZES
    ),
}
"""Field of any class's config.json -> why the logits do not depend on it, or not on it alone.

``quantization_config`` says how stored weights are packed, which the plan looks at by itself.
Source: the ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0.
"""

HARMLESS_IF: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "cross_attention_hidden_size": (),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "moe_layer_freq": (1,),
    "moe_norm_min": (1e-12,),
    "num_mtp_layers": (0, 1, 2, 3),
    "num_nextn_predict_layers": (0, 1, 2, 3),
    "projection_layer_norm_eps": (1e-5,),
    "pruned_heads": ({}, []),
    "rope_interleave": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scoring_func": ("sigmoid",),
    "tie_encoder_decoder": (False,),
    "topk_method": ("noaux_tc",),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (False,),
    "use_mla": (True,),
    "moe_gate": ("topk",),
    "moe_num_shared_experts": (),
}
"""Fields that change the arithmetic unless they have one of these values.

``num_nextn_predict_layers`` and ``num_mtp_layers`` count layers after the last, whose keys are
accounted for themselves.
"""


def unaccounted(
    extra: Mapping[str, object],
    *,
    used: Iterable[str] = (),
    harmless: Iterable[str] = (),
    harmless_if: Mapping[str, tuple[object, ...]] | None = None,
) -> tuple[str, ...]:
    """Fields, as ``name: value``, whose meaning nobody here knows.

    Args:
        extra: Fields that no record names.
        used: Names of fields that a reader looks at all the same.
        harmless: What a family adds to ``HARMLESS_FIELDS``.
        harmless_if: What it adds to ``HARMLESS_IF``.

    >>> unaccounted({"use_cache": True, "no_rope_layers": [0, 1], "is_causal": True, "x": None})
    ('no_rope_layers: [0, 1]',)
    """
    conditions = {**HARMLESS_IF, **(harmless_if or {})}
    looked_at = {*used, *harmless}
    return tuple(
        f"{name}: {_short(value)}"
        for name, value in extra.items()
        if value is not None
        and name not in looked_at
        and name not in HARMLESS_FIELDS
        and not any(value == fine for fine in conditions.get(name, ()))
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
