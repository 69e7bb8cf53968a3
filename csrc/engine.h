// Norms, ratio and update of every layer in ONE launch. A worker is whatever the Device says: an OS thread, a
// test's delayed thread. Workers claim items in list order from one ticket. Every item waits only for items
// with smaller tickets, and each worker finishes its tickets in order, so the smallest unfinished ticket can
// always run: no deadlock with any number of workers.
//
// What the list must hold (date_kernels/plan.py builds and checks it): SCANs come first, and a layer's
// MEASUREs stand together.
//
// Note [Owner updates]. The worker that measured a chunk updates it, last measured first, before it goes on
// to another layer: the chunk still lies in that core's own cache, and cores may not share another. Waiting
// for the ratio cannot deadlock: the layer's other MEASUREs have smaller tickets than any item of a later
// layer, and a worker never waits between claiming and measuring unless it first settles an earlier layer.
//
// Note [Early commit]. Where the ratio is of the update, MEASURE advances the states anyway. It stores them
// where the update can be concluded from them: UPDATE then reads them, but neither the gradient nor do they
// get written again. With skip_nonfinite nothing is stored before the ratio is known, since a layer may have
// to stay as it is. The bits are the same.
#pragma once
#include "arch.h"
#include "plan.h"
#include "trust_ratio.h"

namespace dk::DK_ARCH {

/// The step that a layer takes, 1-based; 1 where it counts none.
DK_INLINE std::int64_t step_of(const Layer& layer) {
  return 1 + (layer.step == nullptr ? 0 : static_cast<std::int64_t>(*layer.step));
}

template <class Device, template <class> class Rule>
void run_worker(Device& worker, const Plan& plan) {
  using Order = typename Device::Order;
  using Count = typename Device::template Atomic<std::uint32_t>;
  using Ticket = typename Device::template Atomic<std::uint64_t>;
  using Row = typename Rule<float>::Row;
  constexpr std::int64_t kNone = -1;
  const std::uint32_t epoch = plan.clock->epoch + 1;  // stable: only the last worker to leave writes it
  double clip = 1;
  bool judged = plan.n_scans == 0;
  std::int64_t pending = kNone;  // a stack of tickets, linked through plan.next

  const bool early = !plan.skip_nonfinite;  // Note [Early commit]

  const auto row_of = [&](const Layer& layer) -> const Row& {
    return reinterpret_cast<const Row*>(plan.rows)[layer.options];
  };
  /// f(chunk), with the chunk in the layer's arithmetic.
  const auto with_chunk = [&](const Item& item, auto f) {
    const Layer& layer = plan.layers[item.layer];
    const Moment now{plan.grad_scale, clip, step_of(layer)};
    worker.template visit<Rule>(layer, row_of(layer), now, item, f);
  };
  const auto slots_of = [&](const Item& item) {
    return plan.slots + plan.layers[item.layer].slot + item.begin / kLeaf;
  };
  const auto is_last = [&](std::uint32_t& counter, std::uint32_t of) {
    return worker.agree([&] { return Count(counter).fetch_add(1, Order::acq_rel) + 1 == of; });
  };
  const auto publish = [&](std::uint32_t& flag) {
    worker.once([&] { Count(flag).store(epoch, Order::release); });
  };
  const auto await = [&](std::uint32_t& flag) {
    worker.agree([&] {
      while (Count(flag).load(Order::acquire) != epoch) worker.pause();
      return true;
    });
  };

  const auto judge = [&] {  // the sums of all SCANs, in order -> one clip factor and one decision
    const double norm = std::sqrt(worker.add_up(plan.slots, plan.n_slots).measured);
    const bool finite = norm <= std::numeric_limits<double>::max();
    // A norm that is NaN stays NaN and one that is infinite gives 0, as in torch.nn.utils.clip_grad_norm_.
    const double factor = plan.max_grad_norm < norm || norm != norm ? plan.max_grad_norm / norm : 1;
    worker.once([&] {
      plan.clock->scanned = 0;
      *plan.verdict = {norm, plan.max_grad_norm == std::numeric_limits<double>::infinity() ? 1 : factor,
                       plan.skip_nonfinite && !finite ? 1.0 : 0.0};
    });
    publish(plan.clock->judged);
  };
  const auto conclude = [&](std::int32_t id) {  // the sums of all leaves, in order -> the layer's ratio
    const Layer& layer = plan.layers[id];
    const Sums sums = worker.add_up(plan.slots + layer.slot, (layer.size + kLeaf - 1) / kLeaf);
    LayerReport report = trust_ratio(sums, row_of(layer), step_of(layer));
    report.skipped = plan.skip_nonfinite && report.ratio != report.ratio ? 1 : 0;
    worker.once([&] {
      plan.arrived[id] = 0;
      plan.reports[id] = report;
    });
    return report;
  };
  const auto update = [&](const Item& item, const LayerReport& report) {
    if (report.skipped != 0) return;
    const bool committed = early && item.kind != Kind::plain;
    with_chunk(item, [&](const auto& chunk) { chunk.update(chunk.rule.place(report.ratio), committed); });
  };
  const auto settle = [&] {
    const std::int32_t id = plan.items[pending].layer;
    await(plan.published[id]);
    const LayerReport report = plan.reports[id];
    for (; pending != kNone; pending = plan.next[pending]) update(plan.items[pending], report);
  };

  for (;;) {
    const auto ticket = static_cast<std::int64_t>(
        worker.agree([&] { return Ticket(plan.clock->ticket).fetch_add(1, Order::relaxed); }));
    const bool done = ticket >= plan.n_items;
    if (pending != kNone && (done || plan.items[ticket].layer != plan.items[pending].layer)) settle();
    if (done) break;
    const Item item = plan.items[ticket];
    if (item.kind == Kind::scan) {
      with_chunk(item, [&](const auto& chunk) { chunk.scan(slots_of(item)); });
      if (is_last(plan.clock->scanned, static_cast<std::uint32_t>(plan.n_scans))) judge();
      continue;
    }
    if (!judged) {
      await(plan.clock->judged);
      judged = true;
      clip = plan.verdict->clip;
      if (plan.verdict->skip != 0) break;  // nothing was measured yet, so nothing is pending
    }
    if (item.kind == Kind::plain) {
      update(item, {0, 0, 0, 1, 0, 0});
      continue;
    }
    with_chunk(item, [&](const auto& chunk) { chunk.measure(slots_of(item), early); });
    if (item.kind == Kind::whole) {
      update(item, conclude(item.layer));
      continue;
    }
    worker.once([&] { plan.next[ticket] = pending; });
    pending = ticket;
    if (is_last(plan.arrived[item.layer], static_cast<std::uint32_t>(plan.layers[item.layer].measures))) {
      conclude(item.layer);
      publish(plan.published[item.layer]);
    }
  }
  // A counter of its own, not the last ticket: it orders every worker's reads of the clock before the write
  // below.
  if (is_last(plan.clock->left, static_cast<std::uint32_t>(worker.workers()))) {
    worker.once([&] {
      plan.clock->ticket = 0;
      plan.clock->left = 0;
      plan.clock->epoch = epoch;
    });
  }
}

}  // namespace dk::DK_ARCH
