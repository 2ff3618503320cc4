import pytest

from gns_pretrain.tracking.jsonl import TrainLine, ValidationLine, read_records
from gns_pretrain.tracking.record import Record
from gns_pretrain.tracking.settings import MetricsSettings

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def open_record(directory, *, resume_step, hparams=None):
    return Record(
        directory,
        MetricsSettings(tensorboard=True, progress="never"),
        is_main=True,
        resume_step=resume_step,
        config={},
        budget=1000,
        run_id="tensorboard",
        hparams=hparams,
    )


def train(record, step, loss):
    line = TrainLine(
        step=step,
        samples=step,
        tokens=10 * step,
        loss=loss,
        lr=0.5,
        grad_norm=1.0,
        batch_size=1,
        micro_batch_size=1,
        accumulation=1,
        step_seconds=1.0,
        tokens_per_second=10.0,
    )
    record.write(line)


def points(directory, name):
    events = event_accumulator.EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_event_files_read_back_with_the_repeated_steps_of_a_resumed_run_once(tmp_path):
    record = open_record(tmp_path, resume_step=0)
    for step in (1, 2, 3, 4):
        train(record, step, loss=float(step))
    record.write(ValidationLine(step=2, tokens=20, loss=2.5))
    record.close()

    record = open_record(tmp_path, resume_step=2)
    for step in (3, 4, 5):
        train(record, step, loss=10.0 * step)
    record.finish({})
    record.close()

    assert points(tmp_path, "loss/train") == [(10, 1), (20, 2), (30, 30), (40, 40), (50, 50)]
    assert points(tmp_path, "loss/validation") == [(20, 2.5)]
    assert points(tmp_path, "train/lr") == [(10 * step, 0.5) for step in range(1, 6)]
    assert points(tmp_path, "train/step") == [(10 * step, step) for step in range(1, 6)]


def test_a_killed_run_keeps_its_points_up_to_its_checkpoint(tmp_path):
    record = open_record(tmp_path, resume_step=0)
    for step in (1, 2):
        train(record, step, loss=float(step))
    record.sync()
    train(record, 3, loss=3.0)  # lost with the process
    resumed = open_record(tmp_path, resume_step=2)
    train(resumed, 3, loss=30.0)
    resumed.close()
    assert points(tmp_path, "loss/train") == [(10, 1), (20, 2), (30, 30)]


def test_a_run_that_starts_over_hides_all_earlier_points(tmp_path):
    record = open_record(tmp_path, resume_step=0)
    record.write(ValidationLine(step=0, tokens=0, loss=9.0))
    train(record, 1, loss=1.0)
    record.close()
    record = open_record(tmp_path, resume_step=0)
    train(record, 1, loss=3.0)
    record.close()
    assert points(tmp_path, "loss/train") == [(10, 3)]


def test_a_deleted_file_or_a_full_disk_ends_the_view_with_one_line(tmp_path, capfd):
    for name, cause in {"deleted": "FileNotFoundError", "full": "No space left"}.items():
        (tmp_path / name).mkdir()
        record = open_record(tmp_path / name, resume_step=0)
        (file,) = (tmp_path / name).glob("events.out.tfevents.*")
        file.unlink()
        if name == "full":
            file.symlink_to("/dev/full")
        for step in range(1, 50):
            train(record, step, loss=1.0)
        record.finish({})
        record.close()
        printed = capfd.readouterr()
        assert printed.err == ""
        failed, filled = (line for line in printed.out.splitlines() if "TensorBoard" in line)
        assert failed.startswith("TensorBoard failed and is left out from here on")
        assert cause in failed
        assert filled == "TensorBoard has been filled in from metrics.jsonl"
        assert len(read_records(tmp_path / name / "metrics.jsonl")) == 49
        if name == "full":
            file.unlink()
        assert points(tmp_path / name, "loss/train") == [(10 * step, 1.0) for step in range(1, 50)]


def test_settings_and_results_make_a_table_of_runs(tmp_path):
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    hparams = {"optimizer.lr": 0.5, "optimizer.betas": [0.9, 0.95], "table": None}
    record = open_record(tmp_path, resume_step=0, hparams=hparams)
    train(record, 1, loss=3.0)
    record.finish({})
    record.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    known = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert known["optimizer.lr"].number_value == 0.5
    assert known["optimizer.betas"].string_value == "[0.9, 0.95]"
    assert metadata.SESSION_END_INFO_TAG in events.summary_metadata
