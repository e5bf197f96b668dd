"""Load: loops and windows against queueing theory on a simulated clock, then against a real server."""

import asyncio
import json
import selectors
from itertools import count, islice

import numpy as np
import pytest
from helpers import clipress

from clipress.bench.fail_if import gate_from
from clipress.bench.server import protocols
from clipress.bench.server.load import (
    Measured,
    Request,
    Windows,
    are_stable,
    arrivals,
    latency_figures,
    measure,
    run,
    server_figures,
)
from clipress.bench.server.protocols import (
    InputTemplate,
    Refused,
    RequestTemplate,
    checked_sender,
    open_wire,
    read_statistics,
)
from clipress.bench.server.results import Load, LoadResults, LoadRow, load_table, write_load
from clipress.bench.server.run import FIGURES, PLACES, broken_by_load, loads_from, places_of
from clipress.errors import RecipeError, ServerError

MODELS = ["embed_image", "image_encoder", "embed_text"]


class Jumping(asyncio.SelectorEventLoop):
    """An event loop that never waits: when every task sleeps, the clock jumps to the next wake-up."""

    now = 0.0

    def __init__(self):
        jumping = self

        class Selector(selectors.SelectSelector):
            def select(self, timeout=None):
                assert timeout is not None, "nobody would ever wake up"
                jumping.now += max(timeout, 0)
                return super().select(0)

        super().__init__(Selector())

    def time(self):
        return self.now


@pytest.fixture
def loop():
    made = Jumping()
    yield made
    made.close()


async def no_statistics():
    return {}


def measured(loop, send, load, **windows):
    settings = Windows(**{"window": 1000, "warm_up": 0, "stability": 0, "trials": 3, **windows})
    return loop.run_until_complete(measure(send, load, settings, no_statistics, count()))


def one_at_a_time(seconds):
    """Return a server that answers in order and takes `seconds(number)` per request."""
    lock = asyncio.Lock()

    async def send(number):
        async with lock:
            await asyncio.sleep(seconds(number))

    return send


def test_a_closed_loop_keeps_the_set_number_of_requests_in_flight(loop):
    under_way, most = 0, 0

    async def send(_):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1

    figures = measured(loop, send, Load(concurrency=4)).figures()
    assert (most, under_way) == (4, 4)  # Requests in flight at the end are cancelled.
    assert figures.infer_per_s == pytest.approx(400, rel=0.01)
    assert figures.p50_ms == figures.p99_ms == pytest.approx(10)
    assert (figures.errors, figures.concurrency, figures.request_rate) == (0, 4, None)


@pytest.mark.parametrize("clients", [1, 3, 8])
def test_a_closed_loop_obeys_littles_law(loop, clients):
    figures = measured(loop, one_at_a_time(lambda _: 0.005), Load(concurrency=clients)).figures()
    assert figures.infer_per_s == pytest.approx(200, rel=0.01)
    assert figures.infer_per_s * figures.mean_ms / 1000 == pytest.approx(clients, rel=0.02)


def lindley(due, service):
    """Return the latencies of a queue with one server, by Lindley's recursion."""
    free, latencies = 0.0, []
    for arrived, takes in zip(due, service, strict=True):
        free = max(free, arrived) + takes
        latencies.append(free - arrived)
    return latencies


def service_with_a_stall(number):
    return 1.0 if number == 50 else 0.004 + 0.001 * (number % 3)


def test_an_open_loop_has_the_latencies_of_a_queue_and_a_stall_delays_everything_behind_it(loop):
    found = measured(loop, one_at_a_time(service_with_a_stall), Load(request_rate=100), window=3000)
    count_ = len(found.requests)
    expected = lindley(islice(arrivals(100), count_), map(service_with_a_stall, range(count_)))
    np.testing.assert_allclose([one.done - one.due for one in found.requests], expected, atol=1e-9)
    assert sum(latency > 0.5 for latency in expected) > 30  # A client that waits for answers would see one.


def test_time_lost_in_the_client_counts_as_latency(loop):
    async def send(number):
        if number == 20:
            loop.now += 2.0  # The client is busy and sends nothing.
        await asyncio.sleep(0.001)

    found = measured(loop, send, Load(request_rate=50), window=3000)
    late = [one for one in found.requests if one.sent - one.due > 0.1]
    assert 60 < len(late) < 140
    assert all(one.done - one.due > 0.1 for one in late)
    assert found.figures().lag_p99_ms > 1500


def test_arrivals_are_a_poisson_process_and_the_same_every_time():
    due = np.fromiter(islice(arrivals(200.0), 50_000), float)
    gaps = np.diff(due, prepend=0)
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.02)
    # The standard deviation of an exponential distribution is its mean.
    assert gaps.std() == pytest.approx(1 / 200, rel=0.02)
    assert (gaps > 3 / 200).mean() == pytest.approx(np.exp(-3), rel=0.05)
    np.testing.assert_array_equal(due[:2000], list(islice(arrivals(200.0), 2000)))


def test_percentiles_leave_the_right_share_of_requests_above_them():
    rng = np.random.default_rng(0)
    requests = [Request(0.0, 0.0, done, None) for done in rng.permutation(np.arange(1, 1001)) / 1000]
    figures = latency_figures(requests)
    for part in (50, 90, 95, 99):
        assert sum(1000 * one.done > figures[f"p{part}_ms"] for one in requests) == 1000 * (100 - part) // 100
    assert figures["mean_ms"] == pytest.approx(500.5)


def test_requests_belong_to_the_window_of_their_answer(loop):
    found = measured(loop, one_at_a_time(lambda _: 0.3), Load(concurrency=1), trials=3)
    assert [round(one.done, 6) for one in found.requests] == [0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1, 2.4, 2.7, 3.0]
    assert found.figures().windows in ((3, 3, 4), (3, 3, 3))  # The last answer arrives as the window ends.
    assert found.times()["due_ms"][:3] == [0, 300, 600]
    assert found.times()["latency_ms"][0] == pytest.approx(300)


def test_warm_up_is_not_measured(loop):
    found = measured(
        loop, one_at_a_time(lambda number: 1.0 if number == 0 else 0.01), Load(concurrency=1), warm_up=1500
    )
    assert found.figures().p99_ms == pytest.approx(10)


@pytest.mark.parametrize(
    "windows, percent, stable",
    [
        ([(100, 1), (109, 1), (105, 1)], 10, True),
        ([(100, 1), (111, 1), (105, 1)], 10, False),
        ([(100, 1), (100, 1.2), (100, 1)], 10, False),
        ([(5, 9), (100, 1), (100, 1), (101, 1)], 10, True),
        ([(100, 1), (100, 1)], 10, False),
        ([(0, float("inf"))] * 3, 10, False),
    ],
)
def test_three_windows_that_agree_in_rate_and_latency_are_stable(windows, percent, stable):
    assert are_stable(windows, percent) is stable


def test_measuring_ends_when_stable_and_reports_the_last_three_windows(loop):
    def slow_at_first(number):
        return 0.02 if number < 100 else 0.01  # Two seconds of slow answers.

    found = measured(loop, one_at_a_time(slow_at_first), Load(concurrency=1), stability=2, trials=10)
    assert found.stable and [round(mark.time, 6) for mark in found.marks] == [2, 3, 4, 5]
    assert found.figures().infer_per_s == pytest.approx(100, rel=0.01)


def test_unstable_measurements_are_reported_as_unstable(loop):
    found = measured(loop, one_at_a_time(lambda n: 0.001 * 1.005**n), Load(concurrency=1), stability=5, trials=4)
    assert not found.stable and [round(mark.time, 6) for mark in found.marks] == [1, 2, 3, 4]


def test_errors_are_counted_without_latency_and_a_dead_server_is_not_hammered(loop):
    async def send(number):
        await asyncio.sleep(0.01)
        if number % 4 == 0:
            raise Refused("no room")

    figures = measured(loop, send, Load(concurrency=1)).figures()
    assert figures.errors == pytest.approx(figures.requests / 4, abs=1)
    assert figures.p99_ms == pytest.approx(10)

    async def dead(_):
        raise ConnectionResetError

    dead_figures = measured(loop, dead, Load(concurrency=2)).figures()
    assert dead_figures.errors == dead_figures.requests < 700
    assert dead_figures.infer_per_s == 0 and np.isnan(dead_figures.p99_ms)


def test_requests_in_flight_are_cancelled_when_the_user_interrupts():
    ended = []

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def work():
        tasks = [asyncio.create_task(forever()) for _ in range(3)]
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(stop)
        await asyncio.gather(*tasks)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(work(), False)
    assert ended == [True] * 3


COUNTED = {
    "model_stats": [
        {
            "name": "m",
            "version": version,
            "inference_count": 60,
            "execution_count": 10,
            "inference_stats": {
                "success": {"count": 30, "ns": 9},
                "queue": {"count": 30, "ns": 3_000_000},
                "compute_infer": {"count": 30, "ns": 60_000_000},
            },
        }
        for version in ("1", "2")
    ]
}


def test_triton_statistics_are_means_between_two_snapshots():
    as_grpc = json.loads(json.dumps(COUNTED), parse_int=str)  # protobuf writes numbers as strings in JSON.
    assert read_statistics(as_grpc) == read_statistics(COUNTED)
    later = read_statistics(COUNTED)
    assert later["m"]["rows"] == 120  # Versions of a model are summed.
    before = {"m": {**dict.fromkeys(later["m"], 0), "requests": 40, "rows": 20, "executions": 10}}
    figures = server_figures(before, later)["m"]
    assert (figures.mean_batch, figures.requests, figures.executions) == (10, 20, 10)
    assert (figures.queue_ms, figures.compute_infer_ms) == (6 / 20, 120 / 20)
    assert server_figures(later, later) == {}


@pytest.mark.parametrize(
    "given, expected",
    [
        (("1:32", None), [1, 2, 4, 8, 16, 32]),
        (("1,8,32", None), [1, 8, 32]),
        (("4:10:3", None), [4, 7, 10]),
        ((None, "50:150:50"), [50, 100, 150]),
        (("2", "7.5"), [2, 7.5]),
        ((None, None), [1, 8, 32]),
    ],
)
def test_a_sweep_is_a_list_a_doubling_or_steps(given, expected):
    assert [load.concurrency or load.request_rate for load in loads_from(*given)] == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1:", "8:4:0:1", "1.5", "nan"])
def test_an_invalid_sweep_is_refused(text):
    with pytest.raises(RecipeError, match=r"--concurrency .*numbers above 0"):
        loads_from(text, None)


def test_gates_apply_only_where_they_say():
    rows = places_of(MODELS, [Load(1), Load(32)])
    rows = [row.model_copy(update={"p99_ms": float(row.concurrency)}) for row in rows]
    gate = gate_from("p99_ms{model=embed_text, concurrency=32} > 10", PLACES)
    assert broken_by_load([gate], rows) == ["p99_ms is 32 (embed_text, concurrency 32), and must not be > 10"]
    assert len(broken_by_load([gate_from("p99_ms > 10", PLACES)], rows)) == len(MODELS)
    for text in ("p98_ms > 1", "p99_ms{concurrency=7} > 1", "p99_ms{model=x} > 1"):
        with pytest.raises(RecipeError):
            broken_by_load([gate_from(text, PLACES)], rows)
    with pytest.raises(RecipeError, match="stage"):
        gate_from("p99_ms{stage=int8} > 1", PLACES)


def test_missing_latencies_are_null_in_the_file_and_read_back(tmp_path):
    rows = places_of(["embed_text"], [Load(request_rate=2.5)])
    written = json.loads(write_load(LoadResults(conditions={"protocol": "http"}, rows=rows), tmp_path).read_text())
    assert written["rows"][0]["p99_ms"] is None and written["rows"][0]["request_rate"] == 2.5
    (row,) = LoadResults.model_validate(written).rows
    assert (row.model, row.load, row.p99_ms) == ("embed_text", Load(request_rate=2.5), None)
    with pytest.raises(ValueError, match="p99"):
        LoadRow.model_validate({**written["rows"][0], "p99": 1.0})


@pytest.fixture(scope="module")
def server(triton, tiny_run):
    from clipress.serve.triton_server import TritonServer

    with TritonServer(tiny_run[0] / "triton" / "python", triton=triton) as server:
        yield server


def template(model, takes, gives, content):
    return RequestTemplate(model, {takes: InputTemplate("BYTES", (1, 1), content)}, gives)


TEMPLATES = {
    "good": template("tokenize", "text", "input_ids", lambda n: b"\x08\0\0\0%08d" % n),
    "bad": template("embed_image", "image", "image_embeds", lambda n: b"\x02\0\0\0no"),
    "unknown": template("nobody", "text", "input_ids", lambda n: b"\x01\0\0\0a"),
}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("load", [Load(concurrency=3), Load(request_rate=50)], ids=str)
def test_a_real_server_counts_the_same_requests(server, protocol, load):
    async def work() -> Measured:
        wire = open_wire(protocol, getattr(server, protocol), False)
        send = await checked_sender(wire, TEMPLATES["good"], "the server")
        try:
            return await measure(send, load, Windows(200, 100, 0, 3), wire.statistics, count(10**7))
        finally:
            await wire.close()

    figures = run(work(), True).figures()
    assert figures.errors == 0 and figures.requests > 5
    under_way = 3 if load.concurrency else figures.requests / 2
    assert figures.triton["tokenize"].requests == pytest.approx(figures.requests, abs=2 * under_way)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_request_refused_by_a_real_server_is_an_error_with_its_message(server, protocol):
    async def work():
        wire = open_wire(protocol, getattr(server, protocol), False)
        try:
            bad = await measure(wire.sender(TEMPLATES["bad"]), Load(2), Windows(200, 0, 0, 3), wire.statistics, count())
            with pytest.raises(ServerError, match="nobody"):
                await checked_sender(wire, TEMPLATES["unknown"], "the server")
        finally:
            await wire.close()
        return bad

    found = run(work(), False)
    assert found.requests and all("not a readable image" in one.error for one in found.requests)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_unreachable_server_is_one_message(tiny_run, protocol, monkeypatch):
    monkeypatch.setattr(protocols, "CONNECT_SECONDS", 0.1)
    result = clipress("bench-server", tiny_run[0], "--url", f"{protocol}://127.0.0.1:9", "--model", "embed_text")
    assert result.exit_code == 2 and "expected an answer from model embed_text" in result.output


def test_the_command_writes_figures_with_every_requests_times(server, tiny_run, tmp_path):
    words = ("--concurrency", "1,2", "--window", "200", "--warm-up", "0", "--trials", "3", "--out", tmp_path)
    url = ("--url", f"grpc://{server.grpc}", "--fail-if", "infer_per_s{model=embed_text} > 0")
    result = clipress("bench-server", tiny_run[0], *words, *url)
    assert result.exit_code == 1 and "Broken: infer_per_s" in result.output, result.output
    written = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["concurrency"]) for row in written["rows"]] == [(m, c) for m in MODELS for c in (1, 2)]
    for row in written["rows"]:
        assert len(row["due_ms"]) == len(row["latency_ms"]) == row["requests"] > 0 == row["errors"]
        assert set(FIGURES) <= set(row) and {row["model"]} <= set(row["triton"])
    assert (
        load_table(LoadResults.model_validate(written)) in result.output and written["conditions"]["protocol"] == "grpc"
    )


def test_without_a_url_a_server_for_the_run_is_started_and_stopped(triton, tiny_run, tmp_path):
    words = ("--concurrency", "1", "--window", "200", "--warm-up", "0", "--trials", "3", "--model", "image_encoder")
    result = clipress("bench-server", tiny_run[0], *words, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))["rows"]
    assert row["errors"] == 0 < row["requests"]
