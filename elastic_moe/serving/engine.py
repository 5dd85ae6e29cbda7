"""The engine process: one rank's model, its requests, and the loop that keeps all ranks in step."""

import argparse
import logging
import os
import queue
import sys
import threading
import time

import psutil
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from transformers import PreTrainedModel

from elastic_moe.config import ModelConfig
from elastic_moe.errors import ElasticError
from elastic_moe.integrations.transformers import LoadTimer, elasticize, meta_model
from elastic_moe.layer import ElasticMoELayer
from elastic_moe.membership.channel import Channel, EngineStart, Ready, Refused, ViewChanged
from elastic_moe.membership.rendezvous import host_of
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.serving.batching import Batcher
from elastic_moe.serving.mailbox import Mailbox
from elastic_moe.serving.protocol import Cancel, Status, Submit, Tokens, Wake

log = logging.getLogger("elastic_moe.engine")


class Engine:
    """One rank: model, batcher and mailbox around one runtime. `run` is the step loop."""

    def __init__(self, start: EngineStart) -> None:
        """Meet the other ranks, then load the model. Collective over the launch.

        Raises:
            ValueError: the configuration does not fit the model; the message says what does.
            PeerLost: another rank did not come.
        """
        self._start = start
        config = start.config
        self._phase = "loading"
        self._load_seconds = 0.0
        self._batcher: Batcher | None = None
        self._process = psutil.Process()
        device = pick_device(config.model, start.launch.local_rank, start.launch.local_world_size)
        model = meta_model(config.model.path, pick_dtype(config.model.dtype))
        host = host_of(start.launch)
        self._mailbox = Mailbox(host, self.status)
        self.runtime = ElasticRuntime.join(
            start.launch,
            device=device,
            address=self._mailbox.address,
            start_timeout_s=config.elastic.start_timeout_s,
            exchange_timeout_s=config.elastic.exchange_timeout_s,
        )
        self._mailbox.start()
        self._model = self._load(model)
        self._layers = [m for m in self._model.modules() if isinstance(m, ElasticMoELayer)]
        self._batcher = Batcher(self._model, config.serving, eos_token_ids(self._model), self._deliver)
        self._peers = [m.address for m in self.runtime.view.members if m.rank != self.runtime.rank]
        self._handshakes = 0
        self._woken_for = 0

    def _load(self, model: PreTrainedModel) -> PreTrainedModel:
        config, timer = self._start.config, LoadTimer()
        begin = time.monotonic()
        columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, transient=True, disable=self.runtime.rank != 0 or not sys.stderr.isatty()) as bar:
            task = bar.add_task("loading", total=None)

            def progress(done: int, total: int) -> None:
                timer(done, total)
                bar.update(task, completed=done, total=total)

            model = elasticize(
                model,
                self.runtime,
                checkpoint=config.model.path,
                slots_per_rank=config.elastic.slots_per_rank,
                redundant_slots=config.elastic.redundant_slots,
                progress=progress,
            )
        self._load_seconds = time.monotonic() - begin
        log.info("loaded %s", timer.summary())
        return model

    def run(self) -> None:
        """Serve until the process ends. All ranks go through the same handshakes and the same MoE layers.

        Raises:
            PeerLost: a rank was lost.
        """
        self.runtime.groups.control.barrier()
        self._phase = "serving"
        self._mailbox.announce()
        asleep = False
        while True:
            self._take_mail(block=asleep)
            has_work = self._batcher.prepare()
            self._handshakes += 1
            if asleep and self._woken_for < self._handshakes:
                self._mailbox.ring(self._peers, Wake(self.runtime.epoch, self._handshakes))
            (work_somewhere,) = self.runtime.agree(int(has_work))
            asleep = not work_somewhere
            if work_somewhere:
                self._step(has_work)

    def _step(self, has_work: bool) -> None:
        with self.runtime.step():
            if has_work:
                self._batcher.forward()
            else:
                with torch.no_grad():
                    for layer in self._layers:
                        layer.join_idle()
        if has_work:
            self._batcher.commit()

    def _take_mail(self, block: bool) -> None:
        """Take all messages in; when the group sleeps, wait until there is work or a peer has rung for us."""
        while True:
            sleeping = block and not self._batcher.has_requests and self._woken_for <= self._handshakes
            try:
                message = self._mailbox.inbox.get(block=sleeping)
            except queue.Empty:
                return
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Cancel):
                self._batcher.cancel(message.request_id)
            elif message.epoch == self.runtime.epoch:
                self._woken_for = max(self._woken_for, message.step)

    def _submit(self, submit: Submit) -> None:
        try:
            self._batcher.submit(submit)
        except ValueError as error:
            self._deliver(submit.request_id, submit.num_generated, [], "error", str(error))

    def _deliver(self, request_id: str, start: int, tokens: list[int], finish: str, error: str) -> None:
        incarnation = self.runtime.seat.member.incarnation
        self._mailbox.send(Tokens(request_id, incarnation, start, tokens, finish, error))

    def status(self) -> Status | None:
        """This rank's state; None until the runtime exists. Called from the mailbox's thread."""
        runtime = getattr(self, "runtime", None)
        if runtime is None or self._batcher is None:
            return None
        placement = runtime.registry.placement
        cuda = runtime.device.type == "cuda"
        return Status(
            rank=runtime.rank,
            incarnation=runtime.seat.member.incarnation,
            phase=self._phase,
            view=runtime.view,
            placement_version=placement.version,
            placement_hash=placement.hash,
            slots=placement.of_rank(runtime.rank).tolist(),
            num_experts=placement.num_experts,
            running=self._batcher.running,
            waiting=self._batcher.waiting,
            steps=runtime.steps,
            tokens_generated=self._batcher.tokens_generated,
            memory_bytes=torch.cuda.memory_allocated(runtime.device) if cuda else self._process.memory_info().rss,
            load_seconds=self._load_seconds,
        )


def pick_device(config: ModelConfig, local_rank: int, local_world_size: int) -> torch.device:
    """The device of this rank.

    Raises:
        ValueError: cuda is asked for and there are fewer GPUs than local ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and gpus < local_world_size:
        raise ValueError(f"model.device=cuda: {local_world_size} local ranks but {gpus} GPUs; start fewer, or use cpu")
    if config.device == "cpu" or gpus < local_world_size:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a `model.dtype`; None for auto."""
    return None if name == "auto" else getattr(torch, name)


def eos_token_ids(model: PreTrainedModel) -> list[int]:
    """End-of-sequence tokens of a model: of its generation config, else of its config."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def main() -> None:
    """Entry of `python -m elastic_moe.serving.engine --supervisor-fd N`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--supervisor-fd", type=int, required=True)
    channel = Channel.of_child(parser.parse_args().supervisor_fd)
    start = channel.receive()
    if not isinstance(start, EngineStart):
        raise SystemExit(1)
    logging.basicConfig(
        level=start.config.log_level.upper(),
        format=f"%(asctime)s rank {start.launch.rank} %(levelname)s %(message)s",
    )
    for name in ("ContinuousBatchingLogger", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    threading.Thread(target=_die_with_supervisor, args=(channel,), daemon=True).start()
    try:
        _serve(start, channel)
    except ElasticError as error:
        log.error("%s", error)  # noqa: TRY400 - expected, and told in one line
        os._exit(1)


def _serve(start: EngineStart, channel: Channel) -> None:
    try:
        engine = Engine(start)
    except ValueError as error:
        channel.send(Refused(str(error)))
        os._exit(2)
    channel.send(ViewChanged(engine.runtime.view))
    channel.send(Ready())
    engine.run()


def _die_with_supervisor(channel: Channel) -> None:
    while channel.receive() is not None:
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
