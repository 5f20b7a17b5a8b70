"""What the tiny config of an architecture needs beyond the generic shrinker: sizes that must agree with each other."""

from __future__ import annotations

from typing import Any

Changes = dict[str, Any]

_RESNET: Changes = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
}
# timm, whose backbones are the default, is another package
_DETR: Changes = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {**_RESNET, "out_features": ["stage4"]},
}
_RT_DETR: Changes = {
    "backbone_config": {
        **_RESNET,
        "model_type": "rt_detr_resnet",
        "out_features": ["stage2", "stage3", "stage4"],
        "layer_type": "bottleneck",
    },
    "encoder_in_channels": [12, 16, 24],
    "encoder_hidden_dim": 32,
    "feat_strides": [8, 16, 32],
    "decoder_in_channels": [32, 32, 32],
    "num_feature_levels": 3,
}
_SWIN: Changes = {
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 4, 4],
    "patch_size": 2,
    "window_size": 2,
    "image_size": 32,
}
_SWIN_BACKBONE: Changes = {"model_type": "swin", **_SWIN}
_DEPTH: Changes = {
    "backbone_config": {
        "model_type": "dinov2",
        "num_hidden_layers": 4,
        "out_indices": [1, 2, 3, 4],
        "reshape_hidden_states": False,
        "image_size": 32,
        "patch_size": 8,
        "apply_layernorm": True,
    },
    "neck_hidden_sizes": [8, 12, 16, 24],
    "fusion_hidden_size": 16,
    "head_hidden_size": 8,
    "reassemble_hidden_size": 32,
    "patch_size": 8,
}
_SAM: Changes = {
    "vision_config": {"output_channels": 32, "num_pos_feats": 16},
    "prompt_encoder_config": {"image_embedding_size": 4},
}
_CONVOLUTIONS: Changes = {
    "conv_dim": [16, 16, 16],
    "conv_kernel": [8, 3, 3],
    "conv_stride": [4, 2, 2],
    "num_feat_extract_layers": 3,
}
_WAV2VEC2: Changes = {**_CONVOLUTIONS, "feat_extract_norm": "layer"}
_ENCODEC: Changes = {
    "num_filters": 4,
    "codebook_size": 32,
    "hidden_size": 32,
    "codebook_dim": 32,
    "num_lstm_layers": 1,
    "upsampling_ratios": [4, 2],
}
_ENCODEC_PART: Changes = {"model_type": "encodec", **_ENCODEC}
_MIMI: Changes = {
    "num_filters": 8,
    "codebook_size": 32,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "hidden_size": 32,
    "upsample_groups": 32,
    "num_quantizers": 4,
}
_MIMI_PART: Changes = {"model_type": "mimi", **_MIMI}
_SERIES: Changes = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "input_size": 1}
_ROPE: Changes = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE: Changes = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}}
_MROPE_HALF: Changes = {
    "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
}

_TEXT: dict[str, Changes] = {
    "bros": {"hidden_size": 64},
    "ctrl": {"n_positions": 64, "dff": 48},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {
        "block_sizes": [1, 1, 1],
        "block_repeats": [1, 1, 1],
        "d_model": 32,
        "d_inner": 48,
        "n_head": 4,
        "d_head": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "perceiver": {
        "d_model": 32,
        "d_latents": 24,
        "num_latents": 6,
        "num_self_attends_per_block": 2,
        "num_cross_attention_heads": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "lsh"],
    },
    "time_series_transformer": _SERIES,
}

_EXPERTS: dict[str, Changes] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}, "head_dim": 8},
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2, "n_routed_experts": 4},
    "mistral4": {"head_dim": 16},
}

_STATE_SPACE: dict[str, Changes] = {
    "bamba": {"attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
}

_VISION: dict[str, Changes] = {
    "bit": {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "num_groups": 4},
    "conditional_detr": _DETR,
    "convnext": {"hidden_sizes": [8, 16, 24, 32]},
    "convnextv2": {"hidden_sizes": [8, 16, 24, 32]},
    "dab-detr": _DETR,
    "deformable_detr": {**_DETR, "backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}},
    "depth_anything": _DEPTH,
    "detr": _DETR,
    "donut-swin": _SWIN,
    "dinov2": {"use_swiglu_ffn": True},
    "dpt": {
        "is_hybrid": False,
        "neck_hidden_sizes": [8, 12, 16, 24],
        "fusion_hidden_size": 16,
        "backbone_out_indices": [0, 1, 2, 3],
        "num_hidden_layers": 4,
    },
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "focalnet": {"embed_dim": 16, "depths": [1, 1, 1, 1], "patch_size": 2},
    "grounding-dino": {"backbone_config": {**_SWIN_BACKBONE, "out_indices": [2, 3, 4]}},
    "hgnet_v2": {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 16, 24],
        "stage_mid_channels": [4, 4, 8, 8],
        "stage_out_channels": [8, 16, 24, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
        "embedding_size": 8,
    },
    "hiera": {
        "embed_dim": 16,
        "num_heads": [1, 2, 4, 8],
        "patch_size": [7, 7],
        "image_size": [32, 32],
        "masked_unit_size": [8, 8],
    },
    "levit": {
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "image_size": 64,
        "patch_size": 16,
        "down_ops": [["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 3, 2, 2, 2]],
    },
    "mask2former": {"backbone_config": _SWIN_BACKBONE, "feature_size": 32, "mask_feature_size": 32},
    "maskformer": {"backbone_config": _SWIN_BACKBONE, "fpn_feature_size": 32, "mask_feature_size": 32},
    "mobilenet_v1": {"depth_multiplier": 0.1},
    "mobilenet_v2": {"depth_multiplier": 0.1},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
        "image_size": 64,
        "patch_size": 2,
    },
    "mobilevitv2": {
        "width_multiplier": 0.1,
        "image_size": 64,
        "patch_size": 2,
        "base_attn_unit_dims": [16, 24, 32],
    },
    "oneformer": {
        "backbone_config": _SWIN_BACKBONE,
        "conv_dim": 32,
        "mask_dim": 32,
        "dim_feedforward": 48,
        "encoder_feedforward_dim": 48,
        "decoder_layers": 2,
    },
    "regnet": {"embedding_size": 16, "groups_width": 8},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40]},
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "sam": _SAM,
    "sam2": {
        "vision_config": {
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 16,
                "num_attention_heads": 1,
                "blocks_per_stage": [1, 1, 1, 1],
                "embed_dim_per_stage": [16, 32, 64, 128],
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "image_size": [64, 64],
                "window_size_per_stage": [4, 4, 4, 4],
                "global_attention_blocks": [2],
                "window_positional_embedding_background_size": [4, 4],
            },
            "backbone_channel_list": [128, 64, 32, 16],
        }
    },
    "sam_hq": _SAM,
    "swiftformer": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "table-transformer": _DETR,
    "upernet": {
        "backbone_config": {**_RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "auxiliary_in_channels": 16,
        "pool_scales": [1, 2],
    },
}

_AUDIO: dict[str, Changes] = {
    "audio-spectrogram-transformer": {"max_length": 64},
    "bark": {"codec_config": _ENCODEC_PART},
    "clap": {
        "audio_config": {
            "patch_embeds_hidden_size": 16,
            "hidden_size": 32,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "num_mel_bins": 16,
            "spec_size": 32,
            "window_size": 4,
        }
    },
    "csm": {
        "codec_config": _MIMI_PART,
        "num_codebooks": 4,
        "vocab_size": 32,
        "depth_decoder_config": {"num_codebooks": 4, "vocab_size": 32},
    },
    "dac": {
        "encoder_hidden_size": 4,
        "decoder_hidden_size": 64,
        "codebook_size": 32,
        "codebook_dim": 8,
        "n_codebooks": 2,
    },
    "data2vec-audio": _WAV2VEC2,
    "encodec": _ENCODEC,
    "hubert": _CONVOLUTIONS,
    "kyutai_speech_to_text": {"codec_config": _MIMI_PART},
    "mimi": _MIMI,
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "musicgen": {"audio_encoder": _ENCODEC_PART},
    "sew-d": _CONVOLUTIONS,
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2", **_WAV2VEC2}},
    "speecht5": _WAV2VEC2,
    "unispeech": _WAV2VEC2,
    "vits": {
        "ffn_dim": 48,
        "hidden_size": 32,
        "flow_size": 32,
        "spectrogram_bins": 9,
        "upsample_initial_channel": 32,
        "upsample_rates": [4, 4],
        "upsample_kernel_sizes": [8, 8],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
        "wavenet_dilation_rate": 1,
        "prior_encoder_num_flows": 2,
        "prior_encoder_num_wavenet_layers": 1,
        "posterior_encoder_num_wavenet_layers": 1,
        "depth_separable_num_layers": 1,
        "duration_predictor_filter_channels": 16,
        "duration_predictor_num_flows": 2,
        "duration_predictor_flow_bins": 4,
    },
    "wav2vec2": _WAV2VEC2,
    "wav2vec2-bert": {"vocab_size": 96, "feature_projection_input_dim": 16},
    "wav2vec2-conformer": {**_WAV2VEC2, "vocab_size": 96},
    "wavlm": _WAV2VEC2,
}

_COMPOSITE: dict[str, Changes] = {
    "aria": {"projector_patch_to_query_dict": {"16": 4}},
    "blip-2": {"image_token_index": 79},
    "bridgetower": {
        "num_attention_heads": 4,
        "hidden_size": 64,
        "text_config": {"hidden_size": 64},
        "vision_config": {"hidden_size": 64},
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 4, "IMGIMGAZ": 5, "IMGIMGBZ": 6},
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "resolution": 32,
            "embed_dim": 32,
            "latent_channels": 32,
            "num_embeddings": 8,
        },
    },
    "colqwen2": {"vlm_config": _MROPE},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm46v": _MROPE,
    "glm4v": _MROPE_HALF,
    "glm4v_moe": _MROPE_HALF,
    "layoutlmv3": {"input_size": 32, "patch_size": 8, "coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 24, "channel_shrink_ratio": 2},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "paddleocr_vl": _MROPE,
    "qwen2_5_omni_thinker": _MROPE,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen3_vl": _MROPE,
    "qwen3_vl_moe": _MROPE,
    "step3p7": {"text_config": {"sliding_window": 8}},
}

# model type: what its config needs
CHANGES: dict[str, Changes] = {**_TEXT, **_EXPERTS, **_STATE_SPACE, **_VISION, **_AUDIO, **_COMPOSITE}
