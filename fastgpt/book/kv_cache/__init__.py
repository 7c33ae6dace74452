"""`llms_from_scratch.kv_cache`: the model, the cache and the generating functions of the KV-cache bonus."""
