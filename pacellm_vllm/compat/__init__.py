"""Everything that leans on vLLM internals: each with its symptom and when it can go.

By what it is about:

``engine``     what an engine is configured with before it is made
``models``     the architectures that vLLM knows, and checkpoints as it reads them
``layers``     a model's layers beside banks: attention, recurrent states, shared caches
``ops``        custom operators, and the one of vLLM's that is borrowed
``step``       what a layer can know of the step that it runs in
``scheduler``  what the scheduler tells managers of KV cache groups, and what it does not
``pool``       banks' pages in the pool of KV blocks: their spec, hashes, copies and events
``requests``   a request on its way in
``answers``    a request on its way out
``server``     a server, and what it asks of the engines behind it
``offline``    an engine in this process that is not for good
``logs``       where this plugin's lines are printed
``patching``   the list of what is patched, and how it is

``tests/test_compat.py`` has one test per entry that tells when vLLM moved. ``register()`` imports
all of this in every process, so files import at their top only what vLLM has imported by then.
"""

from pacellm_vllm.compat.answers import HoldSpan, WriteSpan, follow_answers, hold_spans
from pacellm_vllm.compat.engine import (
    ConfigHook,
    add_config_hook,
    add_logits_processor,
    add_worker_extension,
    api_processes,
    is_vllms_cpu_build,
    load_with_drafts,
    set_cpu_worker,
    with_final_blocks,
)
from pacellm_vllm.compat.layers import (
    has_own_cache,
    hides_freed_windows,
    layers_by_name,
    pack_cpu_attention,
    place_shared_layers,
    start_state_updates,
)
from pacellm_vllm.compat.logs import plugin_logger
from pacellm_vllm.compat.models import checkpoint_config, generation_models
from pacellm_vllm.compat.offline import close, config_of
from pacellm_vllm.compat.ops import (
    add_splitting_op,
    eager_in_graphs,
    grouped_product,
    grouped_product_tiles,
    register_custom_op,
)
from pacellm_vllm.compat.patching import PATCHED
from pacellm_vllm.compat.pool import (
    add_block_hash_key,
    check_taken_requests,
    copy_blocks_before_forward,
    evictable_blocks,
    keep_out_of_events,
    key_hashes_of,
    publish_block,
    register_kv_cache_spec,
)
from pacellm_vllm.compat.requests import (
    check_http_requests,
    keep_booleans,
    prepare_requests,
    watch_turns,
)
from pacellm_vllm.compat.scheduler import (
    blocks_kept_free,
    count_cached_tokens_without,
    groups_in_hand,
    managers_of,
    request_in_hand,
    watch_requests,
)
from pacellm_vllm.compat.server import (
    add_engine_method,
    api_key_check,
    ask_all_cores,
    ask_all_engines,
    engine_ranks,
    metrics_registry,
)
from pacellm_vllm.compat.step import (
    in_graph_piece,
    layer_in_step,
    metadata_of_step,
    rows_of_requests,
)
