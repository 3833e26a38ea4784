// Binds runs, the executor, its events and its timeline, for any device.
#include <tuple>
#include <vector>

#include "bindings/module.h"
#include "bindings/pausing_program.h"
#include "graph/operator_times.h"
#include "runtime/clock.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

// Programs of nothing but waiting, for tests and for measuring the control plane.
class SpinProgram final : public Program {
 public:
  SpinProgram(size_t segments, double segment_s, int64_t fail_at)
      : segments_(segments), segment_s_(segment_s), fail_at_(fail_at) {}
  size_t size() const override { return segments_; }
  SegmentLabel label(size_t) const override { return {.op = "spin", .predicted_s = segment_s_}; }
  void execute(size_t i, const ExecutionContext&) override {
    if (static_cast<int64_t>(i) == fail_at_)
      throw std::runtime_error("injected failure in spin");
    const int64_t end = now_ns() + static_cast<int64_t>(segment_s_ * 1e9);
    while (now_ns() < end) {
    }
  }

 private:
  size_t segments_;
  double segment_s_;
  int64_t fail_at_;
};

// A property in seconds of a field in nanoseconds.
template <typename C>
auto seconds(int64_t C::*field) {
  return [field](const C& record) { return to_seconds(record.*field); };
}

std::vector<Event> pop_events(Executor& executor) {
  std::vector<Event> events;
  executor.events().pop_all(events);
  return events;
}

// Tuples of (product_flops, weight_bytes, attention_flops, cache_bytes, other_s, seconds,
// segments).
std::vector<std::tuple<double, double, double, double, double, double, uint32_t>> times_of(
    const Executor& executor, const py::object& object, const MachineRates& rates) {
  const Run& run = own_run(object);
  const auto* program = dynamic_cast<const ModelProgram*>(&program_of(run));
  if (program == nullptr)
    return {};
  const py::gil_scoped_release release;
  std::vector<std::tuple<double, double, double, double, double, double, uint32_t>> out;
  for (const OperatorTime& time : operator_times(executor.timeline(), run, *program, rates)) {
    const OperatorWork& work = time.work;
    out.emplace_back(work.product_flops, work.weight_bytes, work.attention_flops, work.cache_bytes,
                     work.other_s, time.seconds, time.segments);
  }
  return out;
}

// What runs and the executor tell of themselves: values, read only.
void bind_records(py::module_& m) {
  using Accounting = RunAccounting;
  py::class_<Accounting>(m, "RunAccounting", py::module_local())
      .def_property_readonly("dispatched_s", seconds(&Accounting::dispatched_ns))
      .def_property_readonly("first_start_s", seconds(&Accounting::first_start_ns))
      .def_property_readonly("last_end_s", seconds(&Accounting::last_end_ns))
      .def_property_readonly("running_s", seconds(&Accounting::running_ns))
      .def_property_readonly("suspended_s", seconds(&Accounting::suspended_ns))
      .def_property_readonly("max_blocking_s", seconds(&Accounting::max_blocking_ns))
      .def_readonly("num_preemptions", &Accounting::num_preemptions);
  py::class_<ExecutorStats>(m, "ExecutorStats", py::module_local())
      .def_readonly("num_segments", &ExecutorStats::num_segments)
      .def_readonly("num_suspended", &ExecutorStats::num_suspended)
      .def_readonly("num_failed", &ExecutorStats::num_failed)
      .def_property_readonly("max_blocking_s", seconds(&ExecutorStats::max_blocking_ns));
  py::class_<SegmentLabel>(m, "SegmentLabel", py::module_local())
      .def_readonly("op", &SegmentLabel::op)
      .def_readonly("layer", &SegmentLabel::layer)
      .def_readonly("last_layer", &SegmentLabel::last_layer)
      .def_readonly("row_begin", &SegmentLabel::row_begin)
      .def_readonly("row_end", &SegmentLabel::row_end)
      .def_readonly("predicted_s", &SegmentLabel::predicted_s);
  py::class_<TimelineRecord>(m, "TimelineRecord", py::module_local())
      .def_readonly("run_id", &TimelineRecord::run_id)
      .def_readonly("segment", &TimelineRecord::segment)
      .def_readonly("label", &TimelineRecord::label)
      .def_property_readonly("start_s", seconds(&TimelineRecord::start_ns))
      .def_property_readonly("end_s", seconds(&TimelineRecord::end_ns));
  py::class_<TimelineSnapshot>(m, "TimelineSnapshot", py::module_local())
      .def_readonly("records", &TimelineSnapshot::records)
      .def_readonly("next", &TimelineSnapshot::next);
}

void bind_event(py::module_& m) {
  py::class_<Event>(m, "RunEvent", py::module_local())
      .def_property_readonly("kind", [](const Event& e) { return to_string(e.kind); })
      .def_readonly("run", &Event::run)
      .def_readonly("cursor", &Event::cursor)
      .def_property_readonly("time_s", seconds(&Event::time_ns));
}

void bind_run(py::module_& m) {
  py::class_<Run, RunRef>(m, "Run", py::module_local())
      .def_property_readonly("id", &Run::id)
      .def_property_readonly("state", [](const Run& r) { return to_string(r.state()); })
      .def_property_readonly("cursor", &Run::cursor)
      .def_property_readonly("num_segments", &Run::num_segments)
      .def_property_readonly("error", &Run::error)
      .def_property_readonly("remaining_s", &Run::remaining_predicted_s)
      .def_property_readonly("live_bytes",
                             [](const Run& r) { return r.program().live_bytes(r.cursor()); })
      .def("accounting", &Run::accounting)
      .def("labels", [](const Run& run) {
        std::vector<SegmentLabel> out;
        out.reserve(run.num_segments());
        for (size_t i = 0; i < run.num_segments(); ++i)
          out.push_back(run.program().label(i));
        return out;
      });
  m.def(
      "spin_run",
      [](uint64_t id, size_t segments, double segment_s, int64_t fail_at) {
        return make_run(id, std::make_unique<SpinProgram>(segments, segment_s, fail_at));
      },
      py::arg("id"), py::arg("segments"), py::arg("segment_s"), py::arg("fail_at") = -1);
}

}  // namespace

Run& own_run(const py::handle& object) {
  if (!py::isinstance<Run>(object)) {
    const py::type own = py::type::of<Run>();
    const auto full_name = [](const py::handle& type) {
      return std::string(py::str(type.attr("__module__"))) + "." +
             std::string(py::str(type.attr("__qualname__")));
    };
    throw py::type_error("run: got " + full_name(py::type::handle_of(object)) + ", expected " +
                         full_name(own) + ", made by this module");
  }
  return object.cast<Run&>();
}

const Program& program_of(const Run& run) {
  const auto* pausing = dynamic_cast<const PausingProgram*>(&run.program());
  return pausing == nullptr ? run.program() : pausing->inner();
}

py::class_<Executor> bind_runtime(py::module_& m) {
  bind_records(m);
  bind_run(m);
  bind_event(m);
  m.def("now_s", [] { return to_seconds(now_ns()); });
  // Everything that may wait for a segment gives up the GIL; dispatch and cancel never wait.
  py::class_<Executor> executor(m, "Executor", py::module_local());
  executor.def("start", &Executor::start, py::call_guard<py::gil_scoped_release>())
      .def("stop", &Executor::stop, py::call_guard<py::gil_scoped_release>())
      .def(
          "dispatch",
          [](Executor& e, const py::object& run) {
            return e.dispatch(run.is_none() ? RunRef() : RunRef(&own_run(run)));
          },
          py::arg("run").none(true))
      .def(
          "cancel", [](Executor& e, const py::object& run) { return e.cancel(own_run(run)); },
          py::arg("run"))
      .def(
          "suspend", [](Executor& e, const py::object& run) { return e.suspend(own_run(run)); },
          py::arg("run"))
      .def("pop_events", &pop_events)
      .def(
          "timeline",
          [](const Executor& e, uint64_t since) { return e.timeline().snapshot(since); },
          py::arg("since") = 0)
      .def("operator_times", &times_of, py::arg("run"), py::arg("rates"))
      .def("stats", &Executor::stats)
      .def_property_readonly("event_fd", [](Executor& e) { return e.events().fd(); });
  return executor;
}

}  // namespace flowprefill
