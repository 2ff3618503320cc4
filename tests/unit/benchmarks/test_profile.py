from benchmarks.profile import OTHER, Timeline, device_seconds, synchronisations


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
    seconds = Timeline(STEP).seconds()
    expected = {"forward": 20, "backward": 35, "measurement": 15, "waiting": 10, OTHER: 20}
    assert {name: round(1e6 * value) for name, value in seconds.items()} == expected


def test_a_kernel_belongs_to_the_phase_that_launched_it():
    events = [*STEP, launch(15, 1), kernel(1, 7), launch(45, 2), kernel(2, 9), kernel(3, 1)]
    seconds = device_seconds(events, Timeline(events))
    microseconds = {name: round(1e6 * value) for name, value in seconds.items()}
    assert microseconds == {"forward": 7, "measurement": 9, OTHER: 1}


def test_waits_for_the_device_are_counted_by_phase_without_the_one_that_ends_a_step():
    names = [(20, "cudaStreamSynchronize"), (50, "cudaStreamSynchronize"), (60, "cudaLaunchKernel")]
    names += [(95, "cudaDeviceSynchronize"), (150, "cudaDeviceSynchronize")]
    events = [*STEP, *(launch(time, number, name) for number, (time, name) in enumerate(names))]
    assert synchronisations(events, Timeline(events)) == {"forward": 1, "measurement": 1}
