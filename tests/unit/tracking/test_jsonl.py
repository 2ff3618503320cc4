import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns_pretrain.errors import DamagedFileError, InputError, TrainingError
from gns_pretrain.tracking.jsonl import (
    JsonLines,
    last_record,
    read_records,
    truncate_after_step,
)


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"kind": "train", "step": 1, "loss": 0.1})
    assert path.read_bytes() == b'{"kind":"train","step":1,"loss":0.1}\n'
    lines.write({"kind": "train", "step": 2, "loss": 1e-300})
    assert path.read_bytes().count(b"\n") == 2
    lines.close()
    lines.close()


def test_an_existing_record_is_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        lines = JsonLines(path)
        lines.write({"step": step})
        lines.close()
    assert read_records(path) == [{"step": 1}, {"step": 2}]


@given(loss=st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_bit(loss, tmp_path_factory):
    path = tmp_path_factory.mktemp("floats") / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1, "loss": loss})
    lines.close()
    (record,) = read_records(path)
    assert struct.pack("<d", record["loss"]) == struct.pack("<d", loss)


def test_a_full_disk_stops_training_with_the_file_and_the_step():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs Linux's /dev/full")
    lines = JsonLines(full)
    with pytest.raises(TrainingError, match=r"/dev/full: the line of step 7 .*No space left"):
        lines.write({"step": 7})
    lines.close()


def test_a_folder_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be written"):
        JsonLines(tmp_path / "none" / "metrics.jsonl")


KILLED_WRITER = """
import sys
from pathlib import Path
from gns_pretrain.tracking.jsonl import JsonLines

lines = JsonLines(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    lines.write({"kind": "train", "step": step, "loss": 1 / step, "padding": "x" * 5000})
    if step == 100:
        print("written", flush=True)
"""


def test_a_killed_writer_leaves_whole_lines_without_a_gap(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(path)], stdout=subprocess.PIPE
    )
    assert writer.stdout.readline() == b"written\n"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()

    steps = [record["step"] for record in read_records(path)]
    assert len(steps) >= 100
    assert steps == list(range(1, len(steps) + 1))


def test_reading_leaves_out_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"step":3,"lo')
    assert read_records(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"step":4,"loss":2.', b'{"step":2}', b"{", b'{"text":"\xe2\x82'],
    ids=["none", "in a number", "only the newline missing", "one byte", "in a character"],
)
def test_truncating_keeps_the_bytes_of_earlier_lines(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    # Spaces and digits that json.dumps would write in another way.
    kept = b'{"step": 1,  "loss": 1.10}\n{"step":2,"loss":1e0}\n'
    path.write_bytes(kept + b'{"step":3,"loss":1}\n' + torn)
    truncate_after_step(path, 2)
    assert path.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_truncating_goes_by_the_step_not_by_the_position(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":3}\n{"step":2}\n')
    truncate_after_step(path, 2)
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'


def test_truncating_goes_by_when_a_late_line_was_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = b'{"step":4}\n{"step":5}\n{"step":2,"read_at_step":5}\n{"step":6}\n'
    path.write_bytes(lines)
    truncate_after_step(path, 5)
    assert path.read_bytes() == lines[: -len(b'{"step":6}\n')]
    truncate_after_step(path, 4)
    assert path.read_bytes() == b'{"step":4}\n'
    path.write_bytes(b'{"step":2,"read_at_step":"5"}\n')
    with pytest.raises(InputError, match="line 1 is damaged"):
        truncate_after_step(path, 5)


def test_a_record_that_ends_before_its_checkpoint_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match="ends at step 0, but the checkpoint is of step 5"):
        truncate_after_step(path, 5)
    path.write_bytes(b'{"step":4}\n{"step":5}')  # the last one is torn
    with pytest.raises(InputError, match="ends at step 4, but the checkpoint is of step 5"):
        truncate_after_step(path, 5)
    assert path.read_bytes() == b'{"step":4}\n{"step":5}'


def test_truncating_below_zero_empties_and_a_missing_record_is_no_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_after_step(path, -1)
    assert not path.exists()
    assert read_records(path) == []
    path.write_bytes(b'{"step":0}\n')
    truncate_after_step(path, -1)
    assert path.read_bytes() == b""


def test_a_record_with_nothing_to_cut_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n')
    inode = path.stat().st_ino
    truncate_after_step(path, 1)
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"[1]\n", b'{"loss":1}\n', b'{"step":"2"}\n'])
def test_a_damaged_line_inside_is_named_and_nothing_is_cut(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step":1}\n' + damage + b'{"step":3}\n'
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_records(path)
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2 is damaged"):
        truncate_after_step(path, 1)
    assert path.read_bytes() == content


def test_a_number_that_json_lacks_is_refused(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.write({"step": 1, "loss": float("nan")})
    lines.close()


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"kind":"train","step":1,"loss":"low"}', "loss is 'low'"),
        ('{"kind":"train","step":1,"tokens":1.5}', "tokens is 1.5"),
        ('{"kind":"validation","step":1,"loss":Infinity}', "loss is inf"),
        ('{"kind":"noise","step":1,"geometry":["x"]}', "geometry is"),
        ('{"kind":"batch_size","step":1,"from":null}', "from is None"),
        ('{"kind":"train","step":1,"batch_size":1' + "0" * 30 + "}", "batch_size is 1000"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, line, field):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":"train","step":1,"loss":null}\n' + line + "\n")
    with pytest.raises(DamagedFileError, match=f"line 2 is damaged: {field}"):
        read_records(path)
    with pytest.raises(DamagedFileError, match=f"line 1 from its end is damaged: {field}"):
        last_record(path)
