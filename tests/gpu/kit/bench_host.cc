// Section "host": what launches, graphs, waiting and memory cost the host.
#include "devices/cuda/runtime/graph.h"
#include "devices/cuda/runtime/stream.h"
#include "devices/cuda/runtime/stream_event.h"
#include "kernel_bench.h"

namespace flowprefill {
namespace {

// A kernel of a few microseconds: the norm of one row.
class SmallKernel {
 public:
  void launch(cudaStream_t stream) const { FP_CUDA(launch_rms_norm(args_, stream)); }
  Launch times(int count) const {
    return [this, count](cudaStream_t stream) {
      for (int i = 0; i < count; ++i)
        launch(stream);
    };
  }

 private:
  DeviceBuffer hidden_{size_t{kHidden} * 4}, out_{size_t{kHidden} * 2},
      weight_{size_t{kHidden} * 4};
  const RmsNormArgs<Bf16> args_ = norm_args(hidden_, weight_, out_, 1);
};

// Median time of the host for one launch, us.
double host_us(const Launch& launch, int n, cudaStream_t stream) {
  std::vector<double> us;
  for (int round = 0; round < 7; ++round) {
    const double t = now_us();
    for (int i = 0; i < n; ++i)
      launch(stream);
    us.push_back((now_us() - t) / n);
    FP_CUDA(cudaStreamSynchronize(stream));
  }
  return median(us);
}

void bench_gemm_launches(cudaStream_t stream) {
  const DeviceBuffer a = random_halves(size_t{512} * kHidden, 1, 1),
                     b = random_halves(size_t{kHidden} * kHidden, 0.02f, 2);
  DeviceBuffer d(size_t{512} * kHidden * 4);
  const GemmArgs gemm = product_args(a, kHidden, b, kHidden, d, 512, true);
  for (const GemmTile tile : {GemmTile::kHopper128x256, GemmTile::kAmpere128x128}) {
    const Launch launch = [&](cudaStream_t s) { FP_CUDA(launch_gemm(gemm, tile, s)); };
    try {
      launch(stream);
      FP_CUDA(cudaStreamSynchronize(stream));
      say("host", std::string("eager launch of ") + gemm_tile_name(tile) + ", host us",
          text("%.2f", host_us(launch, 50, stream)));
    } catch (const std::exception& error) {
      say("host", gemm_tile_name(tile), error.what());
    }
  }
}

void bench_graphs(const SmallKernel& small, int n, cudaStream_t stream) {
  const Stream capturing = Stream::make();
  double t = now_us();
  const Graph graph = capture(capturing.get(), small.times(n), {});
  const double captured = now_us() - t;
  t = now_us();
  const GraphExec exec(graph, capturing.get(), {});
  capturing.synchronize();
  const double made = now_us() - t;
  const Launch replay = [&](cudaStream_t s) { exec.launch(s, {}); };
  say("host",
      "graph of " + std::to_string(n) + " small kernels: capture us, instantiate and upload us",
      text("%.1f\t%.1f", captured, made));
  say("host",
      "graph of " + std::to_string(n) + ": launch host us, device us in all, device us per kernel",
      text("%.2f\t%.2f\t%.2f", host_us(replay, 50, stream), device_us(replay, stream),
           device_us(replay, stream) / n));
}

// A segment as CudaDevice launches it: event, graph, event.
void bench_segment(const SmallKernel& small, cudaStream_t stream) {
  const Stream capturing = Stream::make();
  const Graph graph = capture(capturing.get(), small.times(9), {});
  const GraphExec exec(graph, capturing.get(), {});
  const StreamEvent from = StreamEvent::make(), to = StreamEvent::make();
  const Launch bare = [&](cudaStream_t s) { exec.launch(s, {}); };
  const Launch timed = [&](cudaStream_t s) {
    from.record(s);
    exec.launch(s, {});
    to.record(s);
  };
  say("host", "segment of 9 kernels: device us without, with its two events",
      text("%.2f\t%.2f", device_us(bare, stream), device_us(timed, stream)));
}

void bench_memory_info() {
  std::vector<double> info;
  for (int i = 0; i < 20; ++i) {
    size_t x = 0, y = 0;
    const double t = now_us();
    FP_CUDA(cudaMemGetInfo(&x, &y));
    info.push_back(now_us() - t);
  }
  say("host", "cudaMemGetInfo us", text("%.1f", median(info)));
}

// Records an event and waits for it, by asking or by a blocking wait; us.
double wait_us(const StreamEvent& done, bool asks, cudaStream_t stream) {
  const double start = now_us();
  done.record(stream);
  if (asks) {
    while (!done.is_done()) {
    }
  } else {
    done.wait();
  }
  return now_us() - start;
}

// Waking up: the end of a kernel of about a millisecond, then an event on the idle stream (what
// DeviceClock::anchor() does).
void bench_waiting(cudaStream_t stream) {
  const DeviceBuffer wide = random_halves(size_t{2 * kInner} * kHidden, 0.02f, 3);
  const DeviceBuffer many = random_halves(size_t{2048} * kHidden, 1, 4);
  DeviceBuffer result(size_t{2048} * 2 * kInner * 2);
  const GemmArgs big = product_args(many, kHidden, wide, 2 * kInner, result, 2048, false);
  const StreamEvent done = StreamEvent::make();
  std::vector<double> asked, slept, idle_asked, idle_slept;
  for (int i = 0; i < 60; ++i) {
    const bool asks = i % 2 == 0;
    FP_CUDA(launch_gemm(big, GemmTile::kAmpere256x128, stream));
    (asks ? asked : slept).push_back(wait_us(done, asks, stream));
    (asks ? idle_asked : idle_slept).push_back(wait_us(done, asks, stream));
  }
  say("host", "end of a kernel seen after us: asking, blocking wait, difference",
      text("%.1f\t%.1f\t%.1f", median(asked), median(slept), median(slept) - median(asked)));
  say("host", "event on an idle stream seen after us: asking, blocking wait",
      text("%.1f\t%.1f", median(idle_asked), median(idle_slept)));
}

void bench_spill_pool(cudaStream_t stream) {
  SpillPool pool(0);
  for (const char* what : {"first", "second"}) {
    const double t = now_us();
    void* memory = pool.take(size_t{512} << 20, stream, {});
    const double took = now_us() - t;
    SpillPool::give_back(memory, stream);
    FP_CUDA(cudaStreamSynchronize(stream));
    say("host", std::string("512 MiB from the spill pool, ") + what + " time, host us",
        text("%.1f", took));
  }
}

}  // namespace

void bench_host(cudaStream_t stream) {
  const SmallKernel small;
  const Launch once = small.times(1);
  once(stream);
  FP_CUDA(cudaStreamSynchronize(stream));
  say("host", "eager launch of a small kernel, host us", text("%.2f", host_us(once, 300, stream)));
  say("host", "small kernel back to back, device us", text("%.2f", device_us(once, stream)));
  bench_gemm_launches(stream);
  for (const int n : {1, 10, 100})
    bench_graphs(small, n, stream);
  bench_segment(small, stream);
  bench_memory_info();
  bench_waiting(stream);
  bench_spill_pool(stream);
}

}  // namespace flowprefill
