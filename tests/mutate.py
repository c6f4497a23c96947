#!/usr/bin/env python
"""Put one fault at a time into a copy of the sources and see that an ordinary test goes red.

    python tests/mutate.py [NAME ...] [--list] [--no-baseline]

Each mutation replaces a string that must occur exactly once in its file. The checkout itself is never changed: all
happens in a temporary copy, in which the tests are first run without a fault (they must be green for red to mean
anything). Prints a table; exit code 0 if every mutation was caught, 1 otherwise. Takes some minutes.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "megatron_zebra",
    "benchmarks",
    "tests",
    "tools",
    "launch",
    "docs",
    "README.md",
    "pretrain_zebra.py",
    "pyproject.toml",
)


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in ``file``; one of the ``tests`` (words for pytest) should fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


RESUME = "tests/training/test_resume.py -k bit_for_bit"
EXPORT = "tests/convert/test_export.py -k sees_w_plus_1"
CONTEXT = "tests/parallel/context/test_attention.py -k one_process"
MUTATIONS = [
    Mutation(
        "window one key short",
        "megatron_zebra/attention/cpu.py",
        "plan(segments.cu_q, segments.cu_k, window, group)",
        "plan(segments.cu_q, segments.cu_k, window and window - 1, group)",
        "tests/attention/test_backends.py",
    ),
    Mutation(
        "window one key long",
        "megatron_zebra/attention/cpu.py",
        "plan(segments.cu_q, segments.cu_k, window, group)",
        "plan(segments.cu_q, segments.cu_k, window and window + 1, group)",
        "tests/attention/test_backends.py",
    ),
    Mutation(
        "phase of the pattern shifted",
        "megatron_zebra/model/pattern.py",
        '"global" if i % layer_group_size == 0',
        '"global" if (i + 1) % layer_group_size == 0',
        "tests/model",
    ),
    Mutation(
        "labels not shifted",
        "megatron_zebra/data/rows.py",
        "read[1:] if counted is None",
        "read[:-1] if counted is None",
        "tests/data/test_order.py",
    ),
    Mutation(
        "labels not masked at a document's edge",
        "megatron_zebra/data/rows.py",
        "        labels[bounds - 1] = IGNORE\n",
        "",
        "tests/data/test_order.py",
    ),
    Mutation(
        "positions do not restart",
        "megatron_zebra/data/rows.py",
        "positions = np.arange(length) - np.repeat(starts, lengths)",
        "positions = np.arange(length)",
        "tests/data/test_order.py",
    ),
    Mutation(
        "documents of a batch see each other",
        "megatron_zebra/data/batch.py",
        "np.concatenate([row.lengths for row in rows])",
        "np.array([row.tokens.size for row in rows])",
        "tests/data/test_batch.py",
    ),
    Mutation(
        "gradient scaled by 2",
        "megatron_zebra/training/step.py",
        "grid.data.size / targets.clamp_min(1)",
        "2 * grid.data.size / targets.clamp_min(1)",
        "tests/training/test_zero.py",
    ),
    Mutation(
        "mean of micro-batch means",
        "megatron_zebra/pipeline/runner.py",
        "self.backward(loss.sum * scale)",
        "self.backward(loss.sum / batch.targets / len(batches))",
        "tests/training/test_zero.py",
    ),
    Mutation(
        "gradients summed over ranks, not averaged",
        "megatron_zebra/parallel/replicated.py",
        ".div_(self.grid.data.size)",
        "",
        "tests/training/test_zero.py",
    ),
    Mutation(
        "weight decay on norms",
        "megatron_zebra/parallel/optimizer.py",
        '{"params": vectors, "weight_decay": 0.0}',
        '{"params": vectors, "weight_decay": weight_decay}',
        "tests/training/test_zero.py",
    ),
    Mutation(
        "a gradient that is not a number is applied",
        "megatron_zebra/parallel/replicated.py",
        "applied = update and bool(torch.isfinite(norm))",
        "applied = update",
        "tests/training/test_nonfinite.py",
    ),
    Mutation(
        "one row repeated after a resume",
        "megatron_zebra/training/loop.py",
        "            consumed_rows=progress.consumed_rows,\n",
        "            consumed_rows=max(0, progress.consumed_rows - 1),\n",
        RESUME,
    ),
    Mutation(
        "moments not restored",
        "megatron_zebra/training/state.py",
        "values.copy_(_read(checkpoint, part, kind))",
        'kind == "weight" and values.copy_(_read(checkpoint, part, kind))',
        RESUME,
    ),
    Mutation(
        "AdamW's count not restored",
        "megatron_zebra/parallel/zero.py",
        "        set_updates(self.adam, updates)\n",
        "",
        RESUME,
    ),
    Mutation(
        "bf16 weights not taken from the restored masters",
        "megatron_zebra/parallel/zero.py",
        "            self.wrapper.update_lp_params()\n",
        "",
        RESUME,
    ),
    Mutation(
        "metrics not cut back on resume",
        "megatron_zebra/training/metrics.py",
        "if step is not None and step > restored_step:",
        "if False:",
        RESUME,
    ),
    Mutation(
        "warm-up one step late",
        "megatron_zebra/training/schedule.py",
        "return peak * (step + 1) / (warmup + 1)",
        "return peak * step / (warmup + 1)",
        "tests/training/test_schedule.py",
    ),
    Mutation(
        "evaluation counts padding rows' place twice",
        "megatron_zebra/evaluation/loss.py",
        "range(first + grid.dp_rank, first + step, grid.dp_size)",
        "range(first, first + step // grid.dp_size)",
        "tests/evaluation",
    ),
    Mutation(
        "who is not there is not told",
        "megatron_zebra/parallel/standstill.py",
        "if place and not place.startswith(ALONE):",
        "if place:",
        "tests/parallel/test_standstill.py",
    ),
    Mutation(
        "a rank that moves counts as standing still",
        "megatron_zebra/parallel/group.py",
        "        self.current = what\n        self.operations += 1\n",
        "        self.current = what\n",
        "tests/parallel/test_standstill.py",
    ),
    Mutation(
        "a spike's update is made all the same",
        "megatron_zebra/parallel/zero.py",
        "self.adam.step = lambda *_, **__: None",
        "self.adam.step = self.adam.step",
        "tests/training/test_spike.py",
    ),
    Mutation(
        "a spike counts as usual from then on",
        "megatron_zebra/training/loop.py",
        "usual=usual.after(outcome.loss, self.config.training.spike.window) if outcome.accepted else usual",
        "usual=usual.after(outcome.loss, self.config.training.spike.window)",
        "tests/training/test_spike.py",
    ),
    Mutation(
        "what is usual is forgotten at a resume",
        "megatron_zebra/training/state.py",
        'json.dumps(checkpoint.metadata.get("progress"))',
        'json.dumps(checkpoint.metadata["progress"] | {"usual": {}})',
        "tests/training/test_spike.py",
    ),
    Mutation(
        "after a spike the same data is read again",
        "megatron_zebra/training/loop.py",
        "progress = replace(progress, consumed_rows=rows)",
        "progress = replace(progress)",
        "tests/training/test_spike.py",
    ),
    Mutation(
        "replicas are compared among data-parallel ranks alone",
        "megatron_zebra/parallel/replicas.py",
        "[_compare(whole, grid.data), _compare(alike, grid.tp)]",
        "[_compare(whole, grid.data)]",
        "tests/parallel/test_replicas.py",
    ),
    Mutation(
        "waiting for others counts as own work",
        "megatron_zebra/training/step.py",
        "time.perf_counter() - began - grid.traffic.seconds",
        "time.perf_counter() - began",
        "tests/training/test_slow.py",
    ),
    Mutation(
        "a save beside training writes what training has made of the state since",
        "megatron_zebra/training/saver.py",
        "pieces=self.copies.of(state.pieces)",
        "pieces=state.pieces",
        "tests/training/test_saver.py",
    ),
    Mutation(
        "training waits for the disk",
        "megatron_zebra/training/saver.py",
        "            self.running.start(lambda: self._write(state, self.aside))\n",
        "            self.running.start(lambda: self._write(state, self.aside))\n            self.tell(None)\n",
        "tests/training/test_saver.py",
    ),
    Mutation(
        "in the second home the index comes first",
        "megatron_zebra/checkpoint/mirror.py",
        'self._together(group, f"copying {folder.name} to", own)\n        self._together(group, f"copying {folder.name} to", finish, alone=True)',
        'self._together(group, f"copying {folder.name} to", finish, alone=True)\n        self._together(group, f"copying {folder.name} to", own)',
        "tests/checkpoint/test_mirror.py",
    ),
    Mutation(
        "a save without room for latest takes the room of all later ones",
        "megatron_zebra/checkpoint/save.py",
        "catalog.settle(root, keep_last, keep_every, protect)",
        "pass",
        "tests/checkpoint/test_checkpoint_catalog.py",
    ),
    Mutation(
        "latest moves before the data",
        "megatron_zebra/checkpoint/save.py",
        "        files.make_folder(folder)\n    return folder",
        "        files.make_folder(folder)\n        catalog.write_latest(root, folder)\n    return folder",
        "tests/checkpoint",
    ),
    Mutation(
        "index written before the data is on the disk",
        "megatron_zebra/checkpoint/writer.py",
        "                files.sync(file)\n",
        "",
        "tests/checkpoint",
    ),
    Mutation(
        "gradients of lent keys dropped",
        "megatron_zebra/parallel/context/exchange.py",
        "coming.heads] += coming.rows[lent]",
        "coming.heads] += 0 * coming.rows[lent]",
        CONTEXT,
    ),
    Mutation(
        "gradient of a key's second use dropped",
        "megatron_zebra/parallel/context/exchange.py",
        "rows[exchange.reused] += used(exchange.second_use)",
        "rows[exchange.reused] += 0 * used(exchange.second_use)",
        CONTEXT,
    ),
    Mutation(
        "fetched keys of another head group in backward",
        "megatron_zebra/parallel/context/attend.py",
        "Refetch(fetches[g], refetch)",
        "Refetch(fetches[0], refetch)",
        CONTEXT,
    ),
    Mutation(
        "window not shifted across chunks",
        "megatron_zebra/parallel/context/plan.py",
        "pick = place[ranges(k_start, stop)]",
        "pick = place[np.concatenate([np.roll(np.arange(k, s), k - q) for k, q, s in zip(k_start, q_start, stop)])]",
        CONTEXT,
    ),
    Mutation(
        "window one key short across chunks",
        "megatron_zebra/parallel/context/plan.py",
        "fetched_range(b, d, window)[0]",
        "fetched_range(b, d, window and max(1, window - 1))[0]",
        CONTEXT,
    ),
    Mutation(
        "a local layer fetches as a global one does",
        "megatron_zebra/parallel/context/plan.py",
        "fetched_range(b, d, window)[0]",
        "fetched_range(b, d, None)[0]",
        "tests/parallel/context/test_plan.py",
    ),
    Mutation(
        "documents see each other across ranks",
        "megatron_zebra/parallel/context/plan.py",
        'cu[np.searchsorted(cu, begins, side="right") - 1]',
        "0 * begins",
        "tests/parallel/context/test_plan.py",
    ),
    Mutation(
        "the next head group is fetched after this one's attention",
        "megatron_zebra/parallel/context/attend.py",
        """        if g + 1 < groups:
            coming = fetches[g + 1]()
        refetch = None if keep_fetched else Refetch(fetches[g], refetch)
        with refetch.hooks(keys[0]) if refetch else nullcontext():
            out.append(kernel(queries[g], *keys))
""",
        """        refetch = None if keep_fetched else Refetch(fetches[g], refetch)
        with refetch.hooks(keys[0]) if refetch else nullcontext():
            out.append(kernel(queries[g], *keys))
        if g + 1 < groups:
            coming = fetches[g + 1]()
""",
        "tests/parallel/context/test_traffic.py",
    ),
    Mutation(
        "a replicated parameter counts on every tp rank in the norm",
        "megatron_zebra/model/initialize.py",
        "param.tensor_model_parallel = self.sharding.dimension(name) is not None",
        "param.tensor_model_parallel = True",
        "tests/training/test_layouts.py -k 'one_process and world2 and tp2'",
    ),
    Mutation(
        "a norm weight's gradient is not summed over tp",
        "megatron_zebra/model/layers.py",
        "F.rms_norm(x, (x.shape[-1],), sum_gradient(self.weight, self.tp), self.eps)",
        "F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)",
        "tests/training/test_layouts.py -k 'one_process and world2 and tp2'",
    ),
    Mutation(
        "the loss is scaled by cp",
        "megatron_zebra/training/step.py",
        "grid.data.size / targets.clamp_min(1)",
        "grid.cp.size * grid.data.size / targets.clamp_min(1)",
        "tests/training/test_layouts.py -k 'one_process and world2 and cp2'",
    ),
    Mutation(
        "a tied weight's gradient is not summed over the stages",
        "megatron_zebra/training/build.py",
        "weight.tied_over_stages = True",
        "weight.tied_over_stages = False",
        "tests/training/test_layouts.py -k 'one_process and world2 and pp2'",
    ),
    Mutation(
        "a tied weight counts on both ends of a pipeline in the norm",
        "megatron_zebra/model/decoder.py",
        "copy.ds_pipe_replicated = True",
        "copy.ds_pipe_replicated = False",
        "tests/training/test_layouts.py -k 'one_process and world2 and pp2'",
    ),
    Mutation(
        "the bias of a whole K projection is not summed over tp",
        "megatron_zebra/model/layers.py",
        "sum_gradient(self.bias, self.tp)[self.rows]",
        "self.bias[self.rows]",
        "tests/training/test_layouts.py -k 'choices and world4 and tp4 and bias'",
    ),
    Mutation(
        "the weight of a whole K projection is not summed over tp",
        "megatron_zebra/model/layers.py",
        "sum_gradient(self.weight, self.tp)[self.rows]",
        "self.weight[self.rows]",
        "tests/training/test_layouts.py -k 'one_process and world4 and tp4'",
    ),
    Mutation(
        "a rank uses another rank's KV head",
        "megatron_zebra/parallel/sharding.py",
        "head = self.rank * self.num_kv_heads // self.tp",
        "head = self.rank % self.num_kv_heads",
        "tests/training/test_layouts.py -k 'one_process and world4 and tp4'",
    ),
    Mutation(
        "the vocabulary's padding enters the softmax",
        "megatron_zebra/model/decoder.py",
        "weight = self.weight[: self.box.shape[0]]",
        "weight = self.weight",
        "tests/training/test_layouts.py -k 'one_process and world2 and tp2'",
    ),
    Mutation(
        "head groups in the wrong order",
        "megatron_zebra/parallel/context/attend.py",
        "torch.cat(out, 1)",
        "torch.cat(out[::-1], 1)",
        "tests/parallel/context/test_attention.py -k one_process",
    ),
    Mutation(
        "contiguous chunks in the wrong order",
        "megatron_zebra/parallel/context/layout.py",
        'return ranks if order == "contiguous"',
        'return ranks[::-1] if order == "contiguous"',
        "tests/parallel/context/test_layout.py",
    ),
    Mutation(
        "a stage looks up another micro-batch",
        "megatron_zebra/pipeline/stages.py",
        "self.batches[i].inputs",
        "self.batches[0].inputs",
        "tests/training/test_layouts.py -k 'one_process and world2 and pp2'",
    ),
    Mutation(
        "the loss's state is used up in a backward that is split",
        "megatron_zebra/training/build.py",
        'split_backward=config.parallel.pp_schedule == "zero_bubble"',
        "split_backward=False",
        "tests/training/test_layouts.py -k 'choices and zero_bubble'",
    ),
    Mutation(
        "weights' gradients of a split backward are not taken in",
        "megatron_zebra/pipeline/stages.py",
        "        self.collect()\n",
        "",
        "tests/training/test_layouts.py -k 'choices and zero_bubble' tests/training/test_layouts_bf16.py",
    ),
    Mutation(
        "without ZeRO a replicated parameter counts on every tp rank",
        "megatron_zebra/parallel/replicated.py",
        "if self.grid.tp.rank == 0 or param.tensor_model_parallel:",
        "if True:",
        "tests/training/test_layouts.py -k 'choices and world2 and tp2 and bias'",
    ),
    Mutation(
        "every tp rank adds its loss",
        "megatron_zebra/training/step.py",
        "loss is not None and grid.tp.rank == 0:",
        "loss is not None:",
        "tests/training/test_layouts.py -k 'one_process and world2 and tp2'",
    ),
    Mutation(
        "in an evaluation every tp rank adds its loss",
        "megatron_zebra/evaluation/loss.py",
        "token_losses is None or grid.tp.rank:",
        "token_losses is None:",
        "tests/evaluation",
    ),
    Mutation(
        "every tp rank counts its answers",
        "megatron_zebra/evaluation/answers.py",
        "first = grid.tp.rank == 0",
        "first = True",
        "tests/evaluation/test_answers.py -k once",
    ),
    Mutation(
        "lm-eval's continuations scored one token late",
        "megatron_zebra/evaluation/harness.py",
        "torch.arange(end - len(wanted), end)",
        "torch.arange(end - len(wanted) - 1, end - 1)",
        "tests/evaluation/test_harness.py -k scores",
    ),
    Mutation(
        "lm-eval is asked without the tokenizer's own first token",
        "megatron_zebra/evaluation/harness.py",
        "[*self.prefix, *ids]",
        "ids",
        "tests/evaluation/test_harness.py -k scores",
    ),
    Mutation(
        "lm-eval's requests come back in the order of ranks",
        "megatron_zebra/evaluation/harness.py",
        "[parts[number % size][number // size] for number in range(len(requests))]",
        "[result for part in parts for result in part]",
        "tests/evaluation/test_harness.py -k 'share or generated'",
    ),
    Mutation(
        "logits of a later chunk forget the one before",
        "megatron_zebra/inference/language_model.py",
        "        cache = Cache(1)\n        for part in row.to(self.device).split(chunk):\n",
        "        for part in row.to(self.device).split(chunk):\n            cache = Cache(1)\n",
        "tests/tools/test_evaluate_logits.py",
    ),
    Mutation(
        "a task of training runs without the last step",
        "megatron_zebra/training/loop.py",
        'if _due(task.interval, record["step"], final):',
        'if _due(task.interval, record["step"], False):',
        "tests/training/test_tasks.py -k results",
    ),
    Mutation(
        "the oldest of training's results is taken",
        "megatron_zebra/report/run.py",
        "step > before",
        "step < before",
        "tests/tools/test_evaluate_compare.py tests/report/test_report.py",
    ),
    Mutation(
        "a sliding window counts what the one before counted",
        "megatron_zebra/data/rows.py",
        "            if not self._begins_document(start):\n",
        "            if start < 0:\n",
        "tests/evaluation/test_perplexity.py -k sliding",
    ),
    Mutation(
        "a sliding window leaves out one token more",
        "megatron_zebra/data/rows.py",
        "self._seen_before = sequence_length - stride",
        "self._seen_before = sequence_length - stride + 1",
        "tests/evaluation/test_perplexity.py -k sliding",
    ),
    Mutation(
        "documents of a row are not divided as its tokens are",
        "megatron_zebra/evaluation/loss.py",
        "of = of[batch.segments.local_index]",
        "of = of[: len(token_losses)]",
        "tests/evaluation/test_perplexity.py -k divide",
    ),
    Mutation(
        "tokens of a row count on every rank that shares it",
        "megatron_zebra/training/step.py",
        "first = grid.is_first_of_replica",
        "first = True",
        "tests/training/test_reshape.py -k goes_on",
    ),
    Mutation(
        "recomputed keys are fetched a third time",
        "megatron_zebra/training/build.py",
        'parallel.cp_keep_fetched or training.recompute != "none" or',
        "parallel.cp_keep_fetched or",
        "tests/planning/test_communication.py -k counted",
    ),
    Mutation(
        "in bf16 gradients are reduced in bf16",
        "megatron_zebra/parallel/zero.py",
        '        settings["communication_data_type"] = "fp32"\n',
        "",
        "tests/training/test_zero.py -k bf16",
    ),
    Mutation(
        "gathered ZeRO-3 weights are not the restored ones",
        "megatron_zebra/parallel/zero.py",
        "            persistent[0].partition(persistent)\n",
        "",
        "tests/parallel/test_optimizer.py -k restored",
    ),
    Mutation(
        "what tp ranks hold alike is written by each",
        "megatron_zebra/parallel/optimizer.py",
        "if not param.tensor_model_parallel:",
        "if False:",
        "tests/training/test_reshape.py",
    ),
    Mutation(
        "torch prints its schedule over a stage's failure",
        "megatron_zebra/pipeline/stages.py",
        "log.setLevel(logging.CRITICAL)",
        "log.setLevel(level)",
        "tests/pipeline/test_failure.py",
    ),
    Mutation(
        "a stage's failure in torch's wrapping",
        "megatron_zebra/pipeline/stages.py",
        "failure = page.__cause__ or page",
        "failure = page",
        "tests/pipeline/test_failure.py",
    ),
    Mutation(
        "loss on user turns",
        "megatron_zebra/data/rows.py",
        "read[1:] if counted is None else np.where(counted[1:], read[1:], IGNORE)",
        "read[1:]",
        "tests/training/test_chat_loss.py -k layout0",
    ),
    Mutation(
        "the loss mask is one token late",
        "megatron_zebra/data/rows.py",
        "np.where(counted[1:], read[1:], IGNORE)",
        "np.where(counted[:-1], read[1:], IGNORE)",
        "tests/data/test_lengths.py -k rows_of",
    ),
    Mutation(
        "the token that ends a turn is left out",
        "megatron_zebra/data/chat_template.py",
        "return start, inside[-1].end()",
        "return start, inside[-1].start()",
        "tests/data/test_chat.py -k 'S01 and chatml'",
    ),
    Mutation(
        "a conversation is cut in silence",
        "megatron_zebra/training/inputs.py",
        "check_fits(source, shortest)",
        "pass",
        "tests/data/test_lengths.py -k one_blend",
    ),
    Mutation(
        "the answer is looked for one token late",
        "megatron_zebra/evaluation/answers.py",
        "states[place - 1]",
        "states[place.clamp(max=len(states) - 1)]",
        "tests/evaluation/test_answers.py -k greedy",
    ),
    Mutation(
        "window one key short in the export",
        "megatron_zebra/convert/hosts.py",
        "return arch.window_size + 1",
        "return arch.window_size",
        EXPORT,
    ),
    Mutation(
        "window one key long at import",
        "megatron_zebra/convert/families.py",
        'values.whole("sliding_window", least=2) - 1',
        'values.whole("sliding_window", least=2)',
        "tests/convert/test_families.py -k 'in_and_out and mistral'",
    ),
    Mutation(
        "rows of q and k not put back from GGUF's order",
        "megatron_zebra/convert/gguf_file.py",
        "rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)",
        "rows",
        "tests/convert/test_gguf.py -k put_back",
    ),
    Mutation(
        "scaling of RoPE lost in the export",
        "megatron_zebra/convert/rope_config.py",
        'if rope.scaling == "none":',
        'if rope.scaling in ("none", "linear", "yarn", "llama3"):',
        "tests/convert/test_rope.py -k 'V07 and llama3'",
    ),
    Mutation(
        "scaling of RoPE ignored at import",
        "megatron_zebra/convert/rope_config.py",
        'scaling = new or old or "default"',
        'scaling = "default"',
        "tests/convert/test_rope.py -k 'V06 and linear'",
    ),
    Mutation(
        "a layer without RoPE is exported with it",
        "megatron_zebra/convert/hosts.py",
        "[int(i not in arch.nope_layers) for i in range(arch.num_layers)]",
        "[1 for i in range(arch.num_layers)]",
        "tests/convert/test_families.py -k 'in_and_out and smollm3'",
    ),
    Mutation(
        "the released format's window read as transformers' is",
        "megatron_zebra/convert/families.py",
        'layer_kinds(layers, values.whole("layer_group_size")), values.whole("window_size")',
        'layer_kinds(layers, values.whole("layer_group_size")), values.whole("window_size") - 1',
        "tests/convert/test_zebra_release.py",
    ),
    Mutation(
        "LoRA scale lost",
        "megatron_zebra/model/layers.py",
        "F.linear(x, a) * self.lora_scale",
        "F.linear(x, a)",
        "tests/model/test_lora.py",
    ),
    Mutation(
        "LoRA scale lost in a merge",
        "megatron_zebra/model/lora.py",
        " * (lora.alpha / lora.rank)",
        "",
        "tests/model/test_lora.py",
    ),
    Mutation(
        "gradient of an adapter's whole matrix not summed over tp",
        "megatron_zebra/model/layers.py",
        "sum_gradient(self.lora_b, self.tp) if self.whole_b else self.lora_b",
        "self.lora_b",
        "tests/training/test_layouts.py -k 'frozen_parts and tp2 and qkv_bias'",
    ),
    Mutation(
        "frozen parameter trained",
        "megatron_zebra/model/initialize.py",
        "param.requires_grad_(self.trained(name))",
        "param.requires_grad_(True)",
        "tests/training/test_frozen.py -k 'weights_stay and settings3'",
    ),
    Mutation(
        "frozen weights not restored",
        "megatron_zebra/parallel/optimizer.py",
        "        if not param.requires_grad:\n            yield held_part",
        "        if not param.requires_grad and param.dim() > 2:\n            yield held_part",
        "tests/training/test_frozen.py -k 'weights_stay and settings3'",
    ),
    Mutation(
        "temperature lost in the gradient of the divergence",
        "megatron_zebra/model/distill.py",
        "own.exp_().sub_(wanted).mul_(temperature)",
        "own.exp_().sub_(wanted)",
        "tests/model/test_distill.py",
    ),
    Mutation(
        "divergence of a rank's part of the vocabulary alone",
        "megatron_zebra/model/distill.py",
        "tp.all_reduce(torch.linalg.vecdot(wanted, other.sub_(own)))",
        "torch.linalg.vecdot(wanted, other.sub_(own))",
        "tests/training/test_distill.py -k axes1",
    ),
    Mutation(
        "RoPE of the loaded model lost",
        "megatron_zebra/training/adopt.py",
        'values["rope"] = merged_rope(model.rope if "rope" in given else None, source, "global")',
        'values["rope"] = model.rope',
        "tests/training/test_adopt.py",
    ),
    Mutation(
        "another RoPE scaling keeps the factor of the loaded model",
        "megatron_zebra/training/adopt.py",
        'asked.get("scaling", theirs.scaling) != theirs.scaling',
        'asked.get("scaling", theirs.scaling) is None',
        "tests/training/test_adopt.py",
    ),
    Mutation(
        "a local layer's cache keeps one key less",
        "megatron_zebra/inference/cache.py",
        "self.slots = window + 1",
        "self.slots = window",
        "tests/inference/test_cache.py -k chunking",
    ),
    Mutation(
        "a chunk of a prompt sees one kept key less",
        "megatron_zebra/inference/cache.py",
        "min(self.length, self.slots - 1)",
        "min(self.length, self.slots - 2)",
        "tests/inference/test_cache.py -k chunking",
    ),
    Mutation(
        "a ring is put together from its newest part on",
        "megatron_zebra/inference/cache.py",
        "torch.cat([kept[first : first + head], kept[: count - head], new])",
        "torch.cat([kept[: count - head], kept[first : first + head], new])",
        "tests/inference/test_cache.py -k chunking",
    ),
    Mutation(
        "a text ended by a stop string is computed on",
        "megatron_zebra/inference/language_model.py",
        "not in stop_tokens and wanted(sequence)]",
        "not in stop_tokens]",
        "tests/inference/test_generate.py -k wanted",
    ),
    Mutation(
        "a damaged copy of the second home is not followed by the one before",
        "megatron_zebra/training/start.py",
        "if found.folder == folder:",
        "if folder:",
        "tests/training/test_saver.py -k second_home",
    ),
    Mutation(
        "a generated token has the position of the one before",
        "megatron_zebra/inference/cache.py",
        "self.cache.lengths[sequence] += count",
        "self.cache.lengths[sequence] += count - 1",
        "tests/inference/test_cache.py -k chunking",
    ),
    Mutation(
        "padding for tp is generated from",
        "megatron_zebra/inference/language_model.py",
        "at = torch.tensor(list(new.values())).cumsum(0) - 1",
        "at = torch.tensor(list(new.values())).cumsum(0) - 1 + step.padding",
        "tests/inference/test_tensor_parallel.py -k 2",
    ),
    Mutation(
        "attention beyond a window counts the window's last key",
        "megatron_zebra/evaluation/attention_mass.py",
        "last = i - window - 1",
        "last = i - window",
        "tests/evaluation/test_attention_mass.py -k dense",
    ),
    Mutation(
        "evaluations after the restored step stay",
        "megatron_zebra/training/sinks.py",
        'MetricsFile(folder / "evaluation.jsonl", restored_step)',
        'MetricsFile(folder / "evaluation.jsonl", 10**9)',
        "tests/training/test_resume.py -k cut_back",
    ),
    Mutation(
        "a chart drops every other point",
        "megatron_zebra/report/charts.py",
        "x=x.astype(np.float32)",
        "x=x[::2].astype(np.float32)",
        "tests/report/test_page.py -k every_point",
    ),
    Mutation(
        "what DeepSpeed moves is taken for measured",
        "megatron_zebra/report/rank_charts.py",
        'partial = "data" if run.config.optimizer.zero_stage else ""',
        'partial = ""',
        "tests/report/test_report.py -k plan",
    ),
    Mutation(
        "charts stay light when the screen goes dark",
        "megatron_zebra/report/page.js",
        'dark.addEventListener("change"',
        'dark.addEventListener("changed"',
        "tests/report/test_page.py -k every_point",
    ),
    Mutation(
        "a stopped run is called finished",
        "megatron_zebra/launching/supervise.py",
        "return DONE if finished() else AGAIN",
        "return DONE",
        "tests/launching/test_supervise.py",
    ),
    Mutation(
        "a launcher that starts others after a signal goes on",
        "megatron_zebra/launching/supervise.py",
        "if bool(new) == bool(told) or",
        "if not (new or told) or",
        "tests/launching/test_supervise.py -k not_started_again",
    ),
    Mutation(
        "a launcher that hangs over a lost node is waited for",
        "megatron_zebra/launching/supervise.py",
        "node0 is None or ranks or not began or node0.answers()",
        "node0 is None or True",
        "tests/launching/test_supervise.py -k hangs",
    ),
    Mutation(
        "nodes of different versions train together",
        "megatron_zebra/launching/nodes.py",
        "if len(groups) > 1:",
        "if len(groups) > 2:",
        "tests/launching/test_nodes.py",
    ),
    Mutation(
        "a run folder of its own goes unnoticed",
        "megatron_zebra/launching/check.py",
        "            return False\n",
        "            return True\n",
        "tests/launching/test_check.py -k folder",
    ),
    Mutation(
        "a node has two links in a round",
        "megatron_zebra/launching/nodes.py",
        "even = count - count % 2",
        "even = count",
        "tests/launching/test_nodes.py -k rounds",
    ),
    Mutation(
        "a job that is done goes back into the queue",
        "launch/slurm/train.sbatch",
        '[ -n "$requeue" ] && [ "$code" = 75 ]',
        '[ -n "$requeue" ]',
        "tests/launching/test_scripts.py -k requeues",
    ),
    Mutation(
        "a key that the documentation misspells",
        "docs/megatron.md",
        "`parallel.timeout` | in seconds",
        "`parallel.time_out` | in seconds",
        "tests/docs/test_keys.py",
    ),
    Mutation(
        "an option that the documentation makes up",
        "docs/data.md",
        "--split-documents blank-line",
        "--split-documents paragraph",
        "tests/docs/test_commands.py -k read_by_its_program",
    ),
    Mutation(
        "a message that the documentation no longer tells",
        "megatron_zebra/config/load.py",
        "is not a section",
        "has a value of its own",
        "tests/docs/test_troubleshooting.py",
    ),
    Mutation(
        "a new message that says no cure",
        "megatron_zebra/checkpoint/locate.py",
        "holds no checkpoint (a run folder, or a folder with index.json, is needed)",
        "was looked through in vain",
        "tests/docs/test_troubleshooting.py",
    ),
    Mutation(
        "a picture that is out of date",
        "megatron_zebra/planning/kv_cache.py",
        "else arch.window_size + 1",
        "else tokens",
        "tests/docs/test_pictures.py",
    ),
    Mutation(
        "a server that is away for a while ends the run",
        "megatron_zebra/checkpoint/files.py",
        "NotTaken if error.errno in AWAY else CheckpointError",
        "CheckpointError",
        "tests/training/test_saver.py -k away",
    ),
    Mutation(
        "what a full disk did not take is lost",
        "megatron_zebra/training/metrics.py",
        "        self._waiting += data\n",
        "        self._waiting = data\n",
        "tests/training/test_metrics.py",
    ),
]


def copy_tree() -> Path:
    """The sources in a folder of their own."""
    folder = Path(tempfile.mkdtemp(prefix="mutate-"))
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def mutated(text: str, mutation: Mutation) -> str:
    """``text`` with the fault; the string must be there exactly once."""
    found = text.count(mutation.old)
    if found != 1:
        raise SystemExit(f"{mutation.name}: found {found} times in {mutation.file}, not once: {mutation.old!r}")
    return text.replace(mutation.old, mutation.new)


def run_tests(folder: Path, tests: str) -> tuple[int, str]:
    """Exit code of pytest in the copy (stopping at the first failure), and the test that failed."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    broken = failed is not None and "::" not in failed[1]  # a file that cannot be collected says nothing
    if broken or result.returncode not in (0, 1):
        raise SystemExit(
            f"pytest {tests}: exit code {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
        )
    return result.returncode, failed[1] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutations to try (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a fault first")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if not arguments.names or mutation.name in arguments.names]
    if arguments.list:
        print("\n".join(mutation.name for mutation in MUTATIONS))
        return 0
    if unknown := set(arguments.names) - {mutation.name for mutation in MUTATIONS}:
        raise SystemExit(f"no such mutation: {', '.join(sorted(unknown))} (--list shows them)")
    for mutation in chosen:
        mutated((ROOT / mutation.file).read_text(), mutation)  # found out now rather than in the middle
    folder = copy_tree()
    try:
        for tests in dict.fromkeys(mutation.tests for mutation in chosen) if not arguments.no_baseline else ():
            code, failed = run_tests(folder, tests)
            if code:
                raise SystemExit(f"red without a fault: {failed}")
            print(f"green without a fault: {tests}", flush=True)
        missed = [mutation.name for mutation in chosen if not try_one(folder, mutation)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{len(chosen) - len(missed)} of {len(chosen)} caught"
        + (f"; NOT caught: {', '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


def try_one(folder: Path, mutation: Mutation) -> bool:
    """Whether a test goes red over ``mutation``; the copy is as before afterwards."""
    file = folder / mutation.file
    text = file.read_text()
    began = time.monotonic()
    try:
        file.write_text(mutated(text, mutation))
        code, failed = run_tests(folder, mutation.tests)
    finally:
        file.write_text(text)
    caught = f"red: {failed}" if code else "NOT CAUGHT"
    print(f"{mutation.name:50s} {time.monotonic() - began:5.0f} s  {caught}", flush=True)
    return code != 0


if __name__ == "__main__":
    sys.exit(main())
