"""The engine process: one rank's model, its requests, and the loop that keeps all ranks in step."""

import argparse
import contextlib
import logging
import math
import os
import queue
import sys
import time

import psutil
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from transformers import PreTrainedModel

from elastic_moe.background import end_process, start_thread
from elastic_moe.config import is_loopback
from elastic_moe.errors import BatchFailed, ElasticError, NotEnoughMembers, NotEnoughSlots, PeerLost, TransferFailed
from elastic_moe.integrations.loading import Whence
from elastic_moe.integrations.transformers import LoadTimer, elasticize, meta_model
from elastic_moe.membership.launch import host_of
from elastic_moe.membership.signals import Wake
from elastic_moe.placement.placement import Placement
from elastic_moe.pulse import Pulse
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.serving.engine.alike import alike
from elastic_moe.serving.engine.batching import Batcher
from elastic_moe.serving.engine.fit import check_fit, eos_token_ids, pick_device, pick_dtype
from elastic_moe.serving.engine.fused import fuse
from elastic_moe.serving.engine.mailbox import Mailbox
from elastic_moe.serving.protocol import Cancel, Event, Finish, Phase, Rebalance, Status, Step, Submit, Tokens
from elastic_moe.serving.starts import EngineStart
from elastic_moe.supervision.channel import Beat, Channel, Ready, Refused, ViewChanged
from elastic_moe.supervision.supervised import die_with_supervisor

log = logging.getLogger(__name__)

SOURCES_AGAIN_S = 5.0
"""An expert that can be had from no source now is asked for again after this long."""


class Engine:
    """One rank: model, batcher and mailbox around one runtime. `run` is the step loop."""

    def __init__(self, start: EngineStart, channel: Channel) -> None:
        """Meet the other ranks and load the model; or, in a dead one's seat, load it and wait to be taken in.

        Raises:
            ValueError: the configuration does not fit the model; the message says what does.
            PeerLost: another rank did not come.
        """
        self._config = start.config
        self._seat = start.seat
        self._channel = channel
        self._deadlines = start.config.elastic.deadlines(start.seat.launch.world_size)
        self._phase, self._reason = Phase.LOADING, ""
        self._load_seconds = 0.0
        self._process = psutil.Process()
        self._pulse = Pulse(self._deadlines.start_s)
        start_thread("beat", self._beat, on_error=end_process)
        self._woken_for = 0
        self._asleep = False
        self._pending = False
        self._told: list[Tokens] = []
        config, launch = start.config, start.seat.launch
        symmetric = config.exchange.kind == "symmetric"
        device = pick_device(config.model, launch.local_rank, launch.local_world_size, may_share=symmetric)
        log.info("this process is in the seat, on %s", device)
        model = meta_model(config.model.path, pick_dtype(config.model.dtype))
        check_fit(model, launch, config)
        self._alike = alike(config, model.dtype)
        self._mailbox = Mailbox(
            host_of(launch), self.status, lambda: self.runtime.pool.balancer.local_loads(), launch.wire
        )
        self.runtime = self._join(device)
        self.runtime.on_change = lambda: self._mailbox.inbox.put(None)
        self.runtime.seat.signals.on(Wake, self._be_woken)
        self._mailbox.start(self.runtime.fail)
        log.info("met; the group is %s", self.runtime.view.ranks)
        self._model = self._load(model)
        captures = symmetric and config.serving.cuda_graphs
        captures = captures and all(experts.is_capturable for experts in self.runtime.pool.store.layers)
        self._batcher = Batcher(
            self._model,
            config.serving,
            eos_token_ids(self._model),
            self._deliver,
            cuda_graphs=captures,
        )
        self.runtime.pool.idle.captures = captures
        if self.runtime.pool.can_rehearse:
            begin = time.monotonic()
            self.runtime.pool.rehearse(self._warm_up)
            log.info("warmed up in %.1f s, %d CUDA graphs", time.monotonic() - begin, self._batcher.num_captures)
        self._num_slots = self.runtime.pool.placement.slots_per_rank
        self.runtime.on_placement_changed.append(self._follow_placement)
        self._pulse.within_s = self._deadlines.progress_s

    def _join(self, device: torch.device) -> ElasticRuntime:
        elastic = self._config.elastic
        return ElasticRuntime.join(
            self._seat,
            device=device,
            address=self._mailbox.address,
            alike=self._alike,
            weights_host=self._weights_host(),
            start_timeout_s=self._deadlines.start_s,
            deadlines=self._deadlines,
            pulse=self._pulse,
            lighthouses=[url for url in elastic.lighthouse.split(",") if url],
            grow_slots=elastic.grow_slots,
            min_members=elastic.min_members,
            eplb=self._config.eplb,
            exchange=self._config.exchange,
        )

    def _weights_host(self) -> str:
        """Whoever may ask this server from elsewhere may ask for its weights there, too, with its token."""
        launch, host = self._seat.launch, self._config.server.host
        one_node = launch.world_size == launch.local_world_size
        return host if one_node and not is_loopback(host) else ""

    def _load(self, model: PreTrainedModel) -> PreTrainedModel:
        config, timer = self._config, LoadTimer()
        begin = time.monotonic()
        columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, transient=True, disable=self.runtime.rank != 0 or not sys.stderr.isatty()) as bar:
            task = bar.add_task("loading", total=None)

            def progress(done: int, total: int) -> None:
                timer(done, total)
                self._pulse.beat()
                bar.update(task, completed=done, total=total)

            model = elasticize(
                model,
                self.runtime,
                checkpoint=config.model.path,
                slots_per_rank=config.elastic.slots_per_rank,
                redundant_slots=config.elastic.redundant_slots,
                whence=Whence(config.model.seeds, config.backup, config.elastic.source_names),
                progress=progress,
            )
        if config.serving.fused_kernels:
            fuse(model)
        self._load_seconds = time.monotonic() - begin
        log.info("loaded %s", timer.summary())
        return model

    def _warm_up(self) -> None:
        self._batcher.warm_up()
        self.runtime.pool.join_idle()

    def run(self) -> None:
        """Serve until the process ends. All ranks go through the same handshakes and the same MoE layers."""
        if self._seat.rejoin is not None:
            self._recover("joining")
        self._serving()
        while True:
            try:
                self._turn()
            except PeerLost as error:
                self._recover(str(error))
            except BatchFailed as error:  # the others wait in layers that this rank does not come to
                self._pending = False
                self._recover(str(error))

    def _turn(self) -> None:
        """One handshake, and the step it agrees on."""
        self._take_mail()
        if not self._pending:
            self._pending = self._batcher.prepare()
            self._send_told()
        next_handshake = self.runtime.handshakes + 1
        if self._asleep and self._woken_for < next_handshake:
            view = self.runtime.view
            others = [m for m in view.members if m.rank != self.runtime.rank]
            self.runtime.seat.signals.tell(others, Wake(view.epoch, view.digest, next_handshake))
        (work,) = self.runtime.agree(int(self._pending))
        if not work and not self._asleep:
            self.runtime.pool.check_integrity()
        self._asleep = not work
        if work and self._pending:
            with self.runtime.step():
                self._batcher.forward()
            self._pending = False
            self._batcher.commit()
            self._send_told()
        elif work:
            self.runtime.join_idle()

    def _recover(self, reason: str) -> None:
        """Come back in a later epoch. What was prepared stays so, and its forward runs again."""
        self._phase, self._reason = Phase.RECOVERING, reason
        self._send_told()
        while True:
            try:
                report = self.runtime.recover(reason)
                break
            except (NotEnoughSlots, NotEnoughMembers, TransferFailed, PeerLost) as error:
                self._phase, self._reason = Phase.UNAVAILABLE, str(error)
                log.error("%s; trying on", error)  # noqa: TRY400 - expected, and told in one line
                self._mailbox.announce()
                waits_for_ranks = isinstance(error, NotEnoughSlots | NotEnoughMembers)
                self._wait_for_change(math.inf if waits_for_ranks else SOURCES_AGAIN_S)
                reason = "the group changes, or tries again"
        self._woken_for = 0
        self._asleep = False
        self._serving()
        self._mailbox.send(Event(self.runtime.rank, report))

    def _wait_for_change(self, at_most_s: float) -> None:
        """Take mail until the group changes or the time is over."""
        end = time.monotonic() + at_most_s
        while not self.runtime.change_is_wanted and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty), self._pulse.expects(None):
                self._take(self._mailbox.inbox.get(timeout=min(left, SOURCES_AGAIN_S)))

    def _follow_placement(self, placement: Placement) -> None:
        """CUDA graphs outlive every change but that of the number of slots: their weights are elsewhere then."""
        if placement.slots_per_rank != self._num_slots:
            self._num_slots = placement.slots_per_rank
            self._batcher.forget_graphs()

    def _serving(self) -> None:
        self._phase, self._reason = Phase.SERVING, ""
        self._channel.send(ViewChanged(self.runtime.view))
        self._mailbox.announce()

    def _take_mail(self) -> None:
        """Take all messages in; when the group sleeps, wait until there is work or somebody wakes this rank."""
        while True:
            sleeping = self._asleep and not self._must_wake()
            try:
                with self._pulse.expects(None if sleeping else self._pulse.within_s):
                    message = self._mailbox.inbox.get(block=sleeping)
            except queue.Empty:
                return
            self._take(message)
            self._tell_of_rebalances()

    def _must_wake(self) -> bool:
        runtime = self.runtime
        wanted = runtime.change_is_wanted or runtime.pool.balancer.wants_steps
        return wanted or self._woken_for > runtime.handshakes or self._batcher.has_requests

    def _tell_of_rebalances(self) -> None:
        reports = self.runtime.pool.balancer.reports
        while not reports.empty():
            self._mailbox.send(Event(self.runtime.rank, reports.get()))

    def _take(self, message: Submit | Cancel | Rebalance | None) -> None:
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Cancel):
            self._batcher.cancel(message.request_id)
        elif isinstance(message, Rebalance):
            with contextlib.suppress(ValueError):  # it is off; front ends know that too
                self.runtime.pool.balancer.request(message.op)
        self._send_told()

    def _be_woken(self, word: Wake) -> None:
        """In the signals' thread."""
        if (word.epoch, word.digest) == (self.runtime.view.epoch, self.runtime.view.digest):
            self._woken_for = max(self._woken_for, word.step)
            self._mailbox.inbox.put(None)

    def _beat(self) -> None:
        """Tell the supervisor that this process lives and gets on, from its start."""
        while True:
            runtime = getattr(self, "runtime", None)
            beat = runtime.beat() if runtime else Beat(self._pulse.count, self._pulse.within_s)
            if not self._channel.send(beat):
                return
            time.sleep(self._deadlines.beat_s)

    def _submit(self, submit: Submit) -> None:
        try:
            self._batcher.submit(submit)
        except ValueError as error:
            self._deliver(submit.request_id, submit.num_generated, [], Finish.ERROR, str(error))

    def _deliver(self, request_id: str, start: int, tokens: list[int], finish: Finish, error: str) -> None:
        incarnation = self.runtime.seat.member.incarnation
        self._told.append(Tokens(request_id, incarnation, start, tokens, finish, error))

    def _send_told(self) -> None:
        """What the batcher has delivered, in one message."""
        if self._told:
            self._mailbox.send(Step(self._told))
            self._told = []

    def status(self) -> Status | None:
        """This rank's state; None until the model is loaded. Called from the mailbox's thread."""
        batcher = getattr(self, "_batcher", None)
        if batcher is None:
            return None
        runtime = self.runtime
        placement = runtime.pool.placement
        cuda = runtime.device.type == "cuda"
        return Status(
            rank=runtime.rank,
            incarnation=runtime.seat.member.incarnation,
            phase=self._phase,
            reason=self._reason,
            view=runtime.view,
            placement_version=placement.version,
            placement_hash=placement.hash,
            slots=placement.of_rank(runtime.rank).tolist(),
            num_experts=placement.num_experts,
            running=batcher.running,
            waiting=batcher.waiting,
            steps=runtime.steps,
            tokens_generated=batcher.tokens_generated,
            memory_bytes=torch.cuda.memory_allocated(runtime.device) if cuda else self._process.memory_info().rss,
            load_seconds=self._load_seconds,
            cuda_graphs=batcher.num_captures,
        )


def main() -> None:
    """Entry of `python -m elastic_moe.serving.engine.engine --supervisor-fd N`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--supervisor-fd", type=int, required=True)
    channel = Channel.of_child(parser.parse_args().supervisor_fd, EngineStart)
    start = channel.receive()
    if not isinstance(start, EngineStart):
        raise SystemExit(1)
    logging.basicConfig(
        level=start.config.log_level.upper(),
        format=f"%(asctime)s rank {start.seat.launch.rank} %(levelname)s %(message)s",
    )
    for name in ("ContinuousBatchingLogger", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    start_thread("supervisor", die_with_supervisor, channel, on_error=end_process)
    try:
        _serve(start, channel)
    except ElasticError as error:
        log.error("%s", error)  # noqa: TRY400 - expected, and told in one line
    except Exception:
        log.exception("this rank ends")
    end_process()


def _serve(start: EngineStart, channel: Channel) -> None:
    try:
        engine = Engine(start, channel)
    except ValueError as error:
        channel.send(Refused(str(error)))
        os._exit(2)
    channel.send(Ready(engine.runtime.device.type))
    engine.run()


if __name__ == "__main__":
    main()
