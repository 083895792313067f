"""The options of `generation.engine` and their types, which follow vLLM's `AsyncEngineArgs`.

Importing vLLM takes many seconds, so the types are listed here. Options with a configuration class of
vLLM's own (`compilation_config`) have no type here: they are passed through.
"""

from __future__ import annotations

from typing import Any

_TEXTS = """
    model model_weights tokenizer hf_config_path runner convert tokenizer_mode allowed_local_media_path
    download_dir safetensors_load_strategy load_format config_format dtype kv_cache_dtype
    distributed_executor_backend master_addr dcp_comm_backend data_parallel_address data_parallel_backend
    moe_backend linear_backend sparse_indexer_topk_backend all2all_backend expert_placement_strategy
    prefix_caching_hash_algo offload_backend logprobs_mode revision code_revision tokenizer_revision
    quantization mm_processor_cache_type mm_hasher_algorithm mm_encoder_tp_mode mm_encoder_attn_backend
    mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path io_processor_plugin
    video_pruning_method mm_tensor_ipc mm_processor_device lora_dtype reasoning_parser reasoning_parser_plugin
    spec_method spec_model show_hidden_metrics_for_version otlp_traces_endpoint
    per_request_spec_decode_metrics jit_monitor_mode scheduling_policy scheduler_cls worker_cls
    worker_extension_cls log_level log_config_file generation_config model_impl attention_backend
    mamba_cache_dtype mamba_ssm_cache_dtype mamba_cache_mode mamba_backend mamba_ssu_algorithm
    performance_mode kv_offloading_backend gdn_prefill_backend kda_prefill_backend kda_decode_backend
"""
_LISTS_OF_TEXTS = """
    allowed_media_domains numa_bind_cpus cpu_offload_params offload_params lora_target_modules
    collect_detailed_traces sleep_preserve_parameter_names kv_cache_dtype_skip_layers logits_processors
"""
_INTEGERS = """
    safetensors_prefetch_num_threads safetensors_prefetch_block_size seed max_model_len
    max_cudagraph_capture_size pipeline_parallel_size master_port nnodes node_rank distributed_timeout_seconds
    cpu_distributed_timeout_seconds tensor_parallel_size prefill_context_parallel_size
    decode_context_parallel_size dcp_kv_cache_interleave_size cp_kv_cache_interleave_size data_parallel_size
    data_parallel_rank data_parallel_start_rank data_parallel_size_local data_parallel_rpc_port
    elastic_ep_max_dp_size ubatch_size dbo_decode_token_threshold dp_sync_interval dbo_prefill_token_threshold
    max_parallel_loading_workers block_size prefix_cache_retention_interval offload_group_size
    offload_num_in_group offload_prefetch_step kv_cache_memory_bytes max_num_batched_tokens
    max_num_scheduled_tokens long_prefill_token_threshold max_num_seqs max_num_active_seqs max_num_queued_reqs
    max_num_queued_tokens max_logprobs mm_shm_cache_max_object_size_mb renderer_num_workers max_loras
    max_lora_rank max_cpu_loras max_lora_cls_labels num_gpu_blocks_override prefill_schedule_interval
    spec_tokens mamba_block_size prefix_match_unit replayssm_buffer_len mamba_cache_philox_rounds
    stream_interval shutdown_timeout
"""
_NUMBERS = """
    cpu_offload_gb swap_space gpu_memory_utilization mm_processor_cache_gb mm_encoder_fp8_scale_save_margin
    video_pruning_rate mm_ipc_gpu_memory_gb watermark kv_cache_metrics_sample kv_offloading_size
"""
_BOOLEANS = """
    enable_return_routed_experts return_sampling_mask skip_tokenizer_init enable_prompt_embeds
    trust_remote_code numa_bind dcp_q_replicate data_parallel_hybrid_lb data_parallel_external_lb
    data_parallel_multi_port_external_lb enable_hc_sp enable_expert_parallel enable_batch_sharded_sampling
    enable_ep_weight_filter enable_elastic_ep enable_dbo disable_nccl_for_dp_synchronization enable_eplb
    enable_prefix_caching disable_sliding_window disable_cascade_attn long_prefill_token_threshold_adaptive
    use_fp64_gumbel enable_trace_replay disable_log_stats aggregate_engine_logging
    allow_deprecated_quantization enforce_eager disable_custom_all_reduce enable_shm_tensor_arena
    language_model_only enable_mm_embeds interleave_mm_strings mm_encoder_only skip_mm_profiling
    mm_device_do_normalize enable_lora fully_sharded_loras enable_tower_connector_lora
    specialize_active_lora enable_mixed_moe_lora_format enable_moe_shared_loras ray_workers_use_nsight
    enable_chunked_prefill disable_chunked_mm_input scheduler_reserve_full_isl
    disable_hybrid_kv_cache_manager kv_cache_metrics cudagraph_metrics enable_layerwise_nvtx_tracing
    enable_mfu_metrics enable_logging_iteration_details jit_monitor_verbose enable_mm_processor_stats
    enable_flashinfer_autotune enable_sleep_mode sleep_mode_offload_cudagraph enable_cumem_allocator
    enable_nccl_comm_suspend enable_mamba_shared_prefix_checkpoint use_replayssm
    enable_mamba_cache_stochastic_rounding use_tqdm_on_load async_scheduling kv_sharing_fast_prefill
    swa_bounded_replay enable_fault_tolerance tokens_only fail_on_environ_validation enable_log_requests
"""
_MAPPINGS = """
    hf_overrides model_class_overrides limit_mm_per_prompt media_io_kwargs mm_processor_kwargs
    default_mm_loras model_loader_extra_config speculative_config watermark_config diffusion_config
    custom_histogram_buckets override_generation_config additional_config quantization_config
"""

ENGINE_KINDS: dict[str, Any] = {
    **dict.fromkeys(_TEXTS.split(), str),
    **dict.fromkeys(_LISTS_OF_TEXTS.split(), list[str]),
    **dict.fromkeys(_INTEGERS.split(), int),
    **dict.fromkeys(_NUMBERS.split(), float),
    **dict.fromkeys(_BOOLEANS.split(), bool),
    **dict.fromkeys(_MAPPINGS.split(), dict),
    "served_model_name": str | list[str],
    "ignore_patterns": str | list[str],
    "hf_token": bool | str,
    "pt_load_map_location": str | dict[str, str],
    "cudagraph_capture_sizes": list[int],
    "numa_bind_nodes": list[int],
    "device_ids": list[int | str],
    "optimization_level": int | str,
}
"""vLLM's engine arguments and their types; each may also be null, and unknown ones are passed through."""
