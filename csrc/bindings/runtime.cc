// Binds runs, the executor, its events and its timeline, for any device.
#include <thread>
#include <vector>

#include "bindings/module.h"
#include "bindings/pausing_program.h"
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

py::dict accounting(const Run& run) {
  const RunAccounting a = run.accounting();
  py::dict d;
  d["created_s"] = to_seconds(a.created_ns);
  d["dispatched_s"] = to_seconds(a.dispatched_ns);
  d["first_start_s"] = to_seconds(a.first_start_ns);
  d["last_end_s"] = to_seconds(a.last_end_ns);
  d["running_s"] = to_seconds(a.running_ns);
  d["suspended_s"] = to_seconds(a.suspended_ns);
  d["last_blocking_s"] = to_seconds(a.last_blocking_ns);
  d["max_blocking_s"] = to_seconds(a.max_blocking_ns);
  d["num_preemptions"] = a.num_preemptions;
  return d;
}

py::dict stats(const Executor& executor) {
  const ExecutorStats s = executor.stats();
  py::dict d;
  d["num_segments"] = s.num_segments;
  d["num_dispatched"] = s.num_dispatched;
  d["num_started"] = s.num_started;
  d["num_suspended"] = s.num_suspended;
  d["num_finished"] = s.num_finished;
  d["num_cancelled"] = s.num_cancelled;
  d["num_failed"] = s.num_failed;
  d["max_blocking_s"] = to_seconds(s.max_blocking_ns);
  return d;
}

py::list pop_events(Executor& executor) {
  std::vector<Event> events;
  executor.events().pop_all(events);
  py::list out;
  for (Event& e : events) {
    out.append(py::make_tuple(to_string(e.kind), std::move(e.run), to_seconds(e.time_ns)));
  }
  return out;
}

py::tuple timeline(const Executor& executor, uint64_t since) {
  const TimelineSnapshot snapshot = executor.timeline().snapshot(since);
  py::list records;
  for (const TimelineRecord& r : snapshot.records) {
    records.append(py::make_tuple(
        r.run_id, r.segment, r.label.op, r.label.layer, r.label.last_layer, r.label.row_begin,
        r.label.row_end, r.label.predicted_s, to_seconds(r.start_ns), to_seconds(r.end_ns)));
  }
  return py::make_tuple(records, snapshot.next, snapshot.num_lost);
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
      .def("accounting", &accounting)
      .def("labels", [](const Run& run) {
        py::list out;
        for (size_t i = 0; i < run.num_segments(); ++i) {
          const SegmentLabel l = run.program().label(i);
          out.append(
              py::make_tuple(l.op, l.layer, l.last_layer, l.row_begin, l.row_end, l.predicted_s));
        }
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
  bind_run(m);
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
          "suspend",
          [](Executor& e, const py::object& run, bool yields) {
            const bool is_asked = e.suspend(own_run(run));
            if (is_asked && yields) {
              // Where all cores compute, the caller runs in place of a compute worker, and without
              // that one the segment does not end.
              const py::gil_scoped_release release;
              std::this_thread::yield();
            }
            return is_asked;
          },
          py::arg("run"), py::arg("yields") = false)
      .def("pop_events", &pop_events)
      .def("timeline", &timeline, py::arg("since") = 0)
      .def("stats", &stats)
      .def_property_readonly("event_fd", [](Executor& e) { return e.events().fd(); });
  return executor;
}

}  // namespace flowprefill
