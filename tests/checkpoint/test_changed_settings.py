"""A resume with other settings: each change is in the log."""

from dist_looksam.run import train

FLAGS = "--data digits --model vit_8 --batch_size 8 --workers 0 --device cpu --steps"
CHANGED = {
    "lr": "0.002", "weight_decay": "0.2", "rho": "0.01", "alpha": "0.1", "k": "2", "clip": "1.0",
    "warmup_steps": "1", "schedule": "constant", "label_smoothing": "0.1", "betas": "0.8,0.99",
    "eps": "1e-5", "reuse": "paper", "micro_batch": "4", "drop_path": "0.1", "keep": "2",
    "save_every": "3", "eval_every": "2",
}  # fmt: skip


def test_every_other_setting_that_changed_is_noted_in_the_log(tmp_path):
    """Of 17 changed settings 5 were noted, though the docs promised a note for each."""
    run = ["--out", str(tmp_path)]
    assert train.main([*FLAGS.split(), "2", *run]) == 0
    assert train.main([*FLAGS.split(), "2", *run, "--resume", "auto"]) == 0
    assert "when the checkpoint was written" not in (tmp_path / "log.txt").read_text()
    changes = [word for name, value in CHANGED.items() for word in (f"--{name}", value)]
    assert train.main([*FLAGS.split(), "4", *changes, *run, "--resume", "auto"]) == 0
    log = (tmp_path / "log.txt").read_text()
    for name in [*CHANGED, "steps"]:
        assert f"{name} is " in log, name
    assert log.count("when the checkpoint was written") == len(CHANGED) + 1
