# SPDX-License-Identifier: Apache-2.0
from mvke_tf.experiments import runs
from mvke_tf.experiments.runs import Progress


def test_progress_says_which_run_which_epoch_and_what_is_left(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    caplog.set_level("INFO")
    progress = Progress(4)
    progress.set_params({"epochs": 10})
    # The first was found finished.
    progress.start(2, "mvke-seed0")
    progress.on_epoch_begin(0)
    assert progress.line(0, 10) == "Run 2 of 4: mvke-seed0, epoch 1 of 10"
    now[0] = 50.0
    assert progress.line(5, 10) == "Run 2 of 4: mvke-seed0, epoch 6 of 10, about 04:10 left"
    now[0] = 100.0
    progress.start(3, "ple-seed0")
    # It goes on with the epoch that was interrupted.
    progress.on_epoch_begin(8)
    now[0] = 150.0
    assert progress.line(9, 10) == "Run 3 of 4: ple-seed0, epoch 10 of 10, about 02:30 left"
    progress.close()
    # No terminal here.
    assert caplog.messages == ["Run 2 of 4: mvke-seed0", "Run 3 of 4: ple-seed0, about 03:20 left"]


def test_what_is_left_of_several_runs_at_a_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    progress = Progress(6, workers=2)
    progress.start(1, "a")
    progress.start(2, "b")
    assert progress.line() == "Run 2 of 6: b"
    now[0] = 60.0
    progress.start(3, "c")
    # One is done, and five are left.
    assert progress.line() == "Run 3 of 6: c, about 05:00 left"
    progress.close()
