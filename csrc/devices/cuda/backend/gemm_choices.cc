#include "devices/cuda/backend/gemm_choices.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace flowprefill {
namespace {

// The file: these lines, one line per choice, and how many there were, so that a file that was cut
// off is noticed.
//   flowprefill-gemm 3
//   device NVIDIA H100 80GB HBM3
//   versions 90 132 13000 13000
//   libraries kernels 1, cublaslt 130000
//   2048 28672 4096 1 0 0 1 0 ampere_256x128
//   choices 1
std::string head_of(const GemmDevice& device) {
  const auto one_line = [](std::string text) {
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text;
  };
  std::ostringstream out;
  out << "flowprefill-gemm 3\ndevice " << one_line(device.name) << "\nversions "
      << device.compute_capability << ' ' << device.num_multiprocessors << ' '
      << device.driver_version << ' ' << device.runtime_version << "\nlibraries "
      << one_line(device.libraries) << '\n';
  return out.str();
}

// False for anything that write_line() does not write.
bool read_line(const std::string& line, GemmChoices* choices) {
  std::istringstream in(line);
  GemmShape shape;
  int output = 0;
  int has_bias = 0;
  int adds_to_d = 0;
  int is_gated = 0;
  int is_fp8 = 0;
  std::string name;
  in >> shape.rows >> shape.columns >> shape.depth >> output >> has_bias >> adds_to_d >> is_gated >>
      is_fp8 >> std::ws;
  const auto is_flag = [](int value) { return value == 0 || value == 1; };
  if (!in || !is_flag(output) || !is_flag(has_bias) || !is_flag(adds_to_d) || !is_flag(is_gated) ||
      !is_flag(is_fp8) || !std::getline(in, name)) {
    return false;
  }
  shape.output = static_cast<GemmOutput>(output);
  shape.has_bias = has_bias == 1;
  shape.adds_to_d = adds_to_d == 1;
  shape.is_gated = is_gated == 1;
  shape.is_fp8 = is_fp8 == 1;
  return choices->emplace(shape, name).second;
}

void write_line(std::ostream& out, const GemmShape& shape, const std::string& name) {
  out << shape.rows << ' ' << shape.columns << ' ' << shape.depth << ' '
      << static_cast<int>(shape.output) << ' ' << shape.has_bias << ' ' << shape.adds_to_d << ' '
      << shape.is_gated << ' ' << shape.is_fp8 << ' ' << name << '\n';
}

}  // namespace

GemmShape shape_of(const GemmArgs& args) {
  const auto* of_class = std::ranges::lower_bound(kRowClasses, args.whole_rows());
  return {.rows = of_class == kRowClasses.end() ? kRowClasses.back() : *of_class,
          .columns = args.whole_columns(),
          .depth = args.depth,
          .output = args.output,
          .has_bias = args.bias != nullptr,
          .adds_to_d = args.adds_to_d,
          .is_gated = args.is_gated,
          .is_fp8 = args.is_fp8()};
}

GemmChoices read_gemm_choices(const std::string& path, const GemmDevice& device) {
  std::ifstream in(path, std::ios::binary);
  std::istringstream head(head_of(device));
  std::string line;
  for (std::string expected; std::getline(head, expected);) {
    if (!std::getline(in, line) || line != expected)
      return {};
  }
  GemmChoices choices;
  while (std::getline(in, line)) {
    if (line == "choices " + std::to_string(choices.size()) && !in.eof())
      return choices;
    if (!read_line(line, &choices))
      return {};
  }
  return {};
}

void write_gemm_choices(const std::string& path, const GemmDevice& device,
                        const GemmChoices& choices) {
  const auto fail = [&path](const std::string& reason) {
    throw std::runtime_error("cache of GEMM choices " + path + ": " + reason);
  };
  std::error_code error;
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (!folder.empty())
    std::filesystem::create_directories(folder, error);
  if (error)
    fail(error.message());
  const std::string unfinished = path + "." + std::to_string(getpid());
  std::ofstream out(unfinished, std::ios::binary | std::ios::trunc);
  out << head_of(device);
  for (const auto& [shape, name] : choices)
    write_line(out, shape, name);
  out << "choices " << choices.size() << '\n';
  out.close();
  if (out)
    std::filesystem::rename(unfinished, path, error);
  if (!out || error) {
    std::error_code ignored;
    std::filesystem::remove(unfinished, ignored);
    fail(error ? error.message() : "cannot be written");
  }
}

}  // namespace flowprefill
