from benchmarks.profile import OTHER, Timeline


def span(name, start, end, thread=1):
    return {"cat": "user_annotation", "name": name, "ts": start, "dur": end - start, "tid": thread}


def launch(time, correlation, name="cudaLaunchKernel"):
    return {
        "cat": "cuda_runtime",
        "name": name,
        "ts": time,
        "dur": 1,
        "args": {"correlation": correlation},
    }


def kernel(correlation, microseconds):
    # It starts long after its launch, in what is another phase on the host by then.
    return {
        "cat": "kernel",
        "name": "k",
        "ts": 500,
        "dur": microseconds,
        "args": {"correlation": correlation},
    }


# A step of 100 microseconds: forward 10 to 30, backward 30 to 80 with a hook from 40 to 55 on
# autograd's own thread, the wait 90 to 100; the rest is between the phases.
STEP = [
    span("step", 0, 100),
    span("forward", 10, 30),
    span("backward", 30, 80),
    span("measurement", 40, 55, thread=2),
    span("waiting", 90, 100),
    span("somebody else's", 0, 200),
]


def test_a_moment_belongs_to_the_innermost_phase_and_the_phases_add_up_to_the_step():
    expected = {"forward": 20, "backward": 35, "measurement": 15, "waiting": 10, OTHER: 20}
    assert Timeline(STEP).host == expected


def test_a_kernel_belongs_to_the_phase_that_launched_it():
    events = [*STEP, launch(15, 1), kernel(1, 7), launch(45, 2), kernel(2, 9), kernel(3, 1)]
    assert Timeline(events).device == {"forward": 7, "measurement": 9, OTHER: 1}


def test_waits_for_the_device_are_counted_by_phase_without_the_one_that_ends_a_step():
    names = [(20, "cudaStreamSynchronize"), (50, "cudaStreamSynchronize"), (60, "cudaLaunchKernel")]
    names += [(95, "cudaDeviceSynchronize"), (150, "cudaDeviceSynchronize")]
    events = [*STEP, *(launch(time, number, name) for number, (time, name) in enumerate(names))]
    assert Timeline(events).waits == {"forward": 1, "measurement": 1}


def test_rows_are_of_one_step():
    row = Timeline([*STEP, launch(15, 1), kernel(1, 8)]).rows(2)
    assert (row["seconds"], row["device_busy_percent"]) == (0.00005, 8.0)
    assert row["phases"][0] == {
        "phase": "forward",
        "seconds": 0.00001,
        "percent": 20.0,
        "device_seconds": 0.000004,
        "device_percent": 100.0,
        "host_synchronisations": 0.0,
    }
