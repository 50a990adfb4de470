"""Settings in which two runs may differ that are still runs of the same kind."""

# Settings that do not change a run's weights (ranks, backend and ZeRO stage give the same weights),
# and the seed, by which the runs of a cell differ.
WITHOUT_EFFECT = {
    "seed", "out", "resume", "save_every", "keep", "requeue", "eval_every", "probe_every", "device",
    "timeout", "dry_run", "ranks", "local_rank", "workers", "data_dir", "data_cache",
    "micro_batch", "backend", "zero_stage", "offload",
}  # fmt: skip
