// Norms, ratio and update of every layer in ONE launch. A worker is whatever the Device says: an OS thread, a
// thread block, a test's delayed thread. Every lane of a worker runs every line; only the Device knows that
// there are lanes. Workers claim items in list order from one ticket. Every item waits only for items with
// smaller tickets, and each worker finishes its tickets in order, so the smallest unfinished ticket can
// always run: no deadlock with any number of workers.
//
// What the list must hold (date_kernels/items.py builds and checks it): SCANs come first, a layer's UPDATEs
// come after its MEASUREs; without UPDATEs a layer's MEASUREs stand together.
//
// Note [Owner updates]. Where Device::kOwnsUpdates there are no UPDATEs: the worker that measured a chunk
// updates it, last measured first, before it goes on to another layer. The chunk still lies in that core's
// own cache, and cores may not share another. Waiting for the ratio cannot deadlock: the layer's other
// MEASUREs have smaller tickets than any item of a later layer, and a worker never waits between claiming and
// measuring unless it first settles an earlier layer.
//
// Note [Early commit]. Where the ratio is of the update, MEASURE advances the states anyway. It stores them
// where the update can be concluded from them: UPDATE then reads them, but neither the gradient nor do they
// get written again. With skip_nonfinite nothing is stored before the ratio is known, since a layer may have
// to stay as it is. The bits are the same; they would not be of states of 16 bits, whose rounding the update
// does not see.
#pragma once
#include "arch.h"
#include "plan.h"
#include "trust_ratio.h"

namespace dk::DK_ARCH {

/// The step that a layer takes, 1-based; 1 where it counts none.
DK_INLINE std::int64_t step_of(const Layer& layer) {
  return 1 + (layer.step == nullptr ? 0 : static_cast<std::int64_t>(*layer.step));
}

DK_INLINE double number(const Number& n) { return n.address == nullptr ? n.value : *n.address; }

template <class Device, template <class> class Rule>
DK_WORK void run_worker(Device& worker, const Plan& plan) {
  using Order = typename Device::Order;
  using Count = typename Device::template Atomic<std::uint32_t>;
  using Ticket = typename Device::template Atomic<std::uint64_t>;
  using Row = typename Rule<float>::Row;
  constexpr std::int64_t kNone = -1;
  const std::uint32_t epoch = plan.clock->epoch + 1;  // stable: only the last worker to leave writes it
  const bool found = number(plan.found_inf) != 0;
  bool stopped = found || (plan.judged && plan.verdict->skip != 0);
  double clip = plan.judged ? plan.verdict->clip : 1;
  bool asked = plan.n_scans == 0;                 // what the SCANs decided
  [[maybe_unused]] std::int64_t pending = kNone;  // a stack of tickets, linked through plan.next

  const auto row_of = [&](const Layer& layer) -> const Row& {
    return reinterpret_cast<const Row*>(plan.rows)[layer.options];
  };
  const auto early = [&](std::int32_t id) {  // Note [Early commit]
    return !plan.skip_nonfinite && !has_16_bits(static_cast<Type>(plan.layers[id].state_type));
  };
  /// f(chunk), with the chunk in the layer's arithmetic.
  const auto with_chunk = [&](const Item& item, auto f) {
    const Layer& layer = plan.layers[item.layer];
    const Moment now{number(plan.grad_scale), clip, step_of(layer)};
    worker.template visit<Rule>(layer, plan.gradients[item.layer], row_of(layer), now, item, f);
  };
  const auto slots_of = [&](const Item& item) {
    return plan.slots + plan.layers[item.layer].slot + item.begin / kLeaf;
  };
  const auto is_last = [&](std::uint32_t& counter, std::int64_t of) {
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
  const auto update = [&](auto& chunk, const LayerReport& report, bool committed) {
    if (report.skipped == 0) chunk.update(chunk.rule.place(report.ratio), committed);
  };
  [[maybe_unused]] const auto settle = [&] {
    const std::int32_t id = plan.items[pending].layer;
    await(plan.published[id]);
    const LayerReport report = plan.reports[id];
    for (; pending != kNone; pending = plan.next[pending]) {
      with_chunk(plan.items[pending], [&](auto& chunk) { update(chunk, report, early(id)); });
    }
  };

  while (!stopped) {
    const auto ticket = static_cast<std::int64_t>(
        worker.agree([&] { return Ticket(plan.clock->ticket).fetch_add(1, Order::relaxed); }));
    const bool done = ticket >= plan.n_items;
    if constexpr (Device::kOwnsUpdates) {
      if (pending != kNone && (done || plan.items[ticket].layer != plan.items[pending].layer)) settle();
    }
    if (done) break;
    const Item item = plan.items[ticket];
    if (item.kind == Kind::scan) {
      with_chunk(item, [&](auto& chunk) { chunk.scan(slots_of(item)); });
      if (is_last(plan.clock->scanned, plan.n_scans)) judge();
      continue;
    }
    if (!asked) {
      await(plan.clock->judged);
      asked = true;
      clip = plan.verdict->clip;
      stopped = plan.verdict->skip != 0;  // nothing was measured yet, so nothing is pending
      if (stopped) break;
    }
    with_chunk(item, [&](auto& chunk) {
      LayerReport report{0, 0, 0, 1, 0, 0};
      const bool commits = item.kind != Kind::plain && early(item.layer);
      if (item.kind == Kind::whole || item.kind == Kind::measure) chunk.measure(slots_of(item), commits);
      if (item.kind == Kind::whole) report = conclude(item.layer);
      if (item.kind == Kind::update) {
        await(plan.published[item.layer]);
        report = plan.reports[item.layer];
      }
      if (item.kind != Kind::measure) update(chunk, report, commits);
    });
    if (item.kind != Kind::measure) continue;
    if constexpr (Device::kOwnsUpdates) {
      worker.once([&] { plan.next[ticket] = pending; });
      pending = ticket;
    }
    if (is_last(plan.arrived[item.layer], plan.layers[item.layer].measures)) {
      conclude(item.layer);
      publish(plan.published[item.layer]);
    }
  }
  // A counter of its own, not the last ticket: it orders every worker's reads before the writes below.
  if (!is_last(plan.clock->left, worker.workers())) return;
  const bool scanned = plan.judged || plan.n_scans != 0;
  // Not `stopped`: a worker that found no item left has not asked what was decided.
  const bool skipped = found || (scanned && plan.verdict->skip != 0);
  if (!skipped) {
    worker.each(plan.n_layers, [&](std::int64_t i) {
      const Layer& layer = plan.layers[plan.first_layer + i];
      if (layer.step != nullptr && plan.reports[plan.first_layer + i].skipped == 0) *layer.step += 1;
    });
  }
  worker.once([&] {
    if (!plan.judged && (found || !scanned)) {
      *plan.verdict = {std::numeric_limits<double>::quiet_NaN(), 1, found ? 1.0 : 0.0};
    }
    plan.clock->ticket = 0;
    plan.clock->left = 0;
    plan.clock->epoch = epoch;
  });
}

}  // namespace dk::DK_ARCH
