// A make-believe accelerator for torch on machines without one: PrivateUse1 tensors whose memory is the host's.
//
// Every operation runs on the CPU, but only after a check that no other tensor argument lies there, and with a count
// of what would make the host wait on a real GPU. What is asked for with non_blocking is done late: a copy to the
// host when something waits for it, a copy from the host at the next operation, so that whoever reads or overwrites
// host memory too early gets wrong numbers here, too.
#include <torch/library.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {
using at::Tensor;
constexpr auto KEY = c10::DispatchKey::PrivateUse1;
constexpr auto DEV = c10::DeviceType::PrivateUse1;

using Counts = std::map<std::string, long>;  // "kind\tname"
std::mutex lock;
thread_local Counts mine;  // a rank may be a thread
Counts every;
thread_local int inside = 0;  // in an operation that runs on the CPU: its own copies do not count

void count(const std::string& kind, const std::string& name) {
  const std::string what = kind + "\t" + name;
  std::lock_guard<std::mutex> g(lock);
  mine[what]++;
  every[what]++;
}
void longest(long bytes) {
  std::lock_guard<std::mutex> g(lock);
  for (Counts* counts : {&mine, &every}) {
    long& most = (*counts)["copies\tlongest"];
    most = std::max(most, bytes);
  }
}

Tensor alias(const Tensor& t) {  // the same memory as a CPU tensor
  if (t.device().type() != DEV) return t;
  auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  if (!t.numel()) return at::empty_strided(t.sizes(), t.strides(), options);
  return at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), options);
}

struct Late {
  uint64_t order;
  Tensor to, from;
  bool up;          // to the device
};
std::deque<Late> late;
uint64_t launched = 0;
std::mutex queue;

// Copies to the host that were launched up to an order; all to the device, which come before any later operation.
void deliver(uint64_t up_to) {
  std::lock_guard<std::mutex> g(queue);
  inside++;
  std::deque<Late> left;
  for (Late& copy : late) {
    if (copy.up || copy.order <= up_to) alias(copy.to).copy_(alias(copy.from));
    else left.push_back(copy);
  }
  late.swap(left);
  inside--;
}
void begin() { if (!inside) deliver(0); }  // of an operation
void wait(const std::string& name) {       // the host does, for all that was launched
  if (inside) return;
  count("waits", name);
  deliver(UINT64_MAX);
}

struct Alloc final : c10::Allocator {
  static void drop(void* p) { std::free(p); }
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (n && posix_memalign(&p, 64, n)) throw std::bad_alloc();
    return {p, p, &drop, c10::Device(DEV, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* d, const void* s, std::size_t n) const override { std::memcpy(d, s, n); }
};
Alloc alloc;
REGISTER_ALLOCATOR(DEV, &alloc);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DEV> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  static c10::Stream only() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(DEV, 0)); }
  c10::Device getDevice() const override { return c10::Device(DEV, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(DEV, 0); }
  c10::Stream getStream(c10::Device) const noexcept override { return only(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only(); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    std::lock_guard<std::mutex> g(queue);
    *event = (void*)(launched + 1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void* event) const override {
    count("waits", "event");
    deliver((uint64_t)event - 1);
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait("stream"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { wait("device"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Device getDeviceFromPtr(void*) const override { return c10::Device(DEV, 0); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto fresh = alloc.allocate(n);
    if (s.data()) std::memcpy(fresh.get(), s.data(), std::min(n, s.nbytes()));
    s.unsafeGetStorageImpl()->set_data_ptr(std::move(fresh));
    s.unsafeGetStorageImpl()->set_nbytes(n);
  }
};

Tensor empty_memory_format(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                           std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &alloc, c10::DispatchKeySet(KEY), c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &alloc, c10::DispatchKeySet(KEY), c10::dtype_or_default(dtype));
}
Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  const bool down = self.device().type() == DEV && dst.device().type() != DEV;
  const bool up = self.device().type() != DEV && dst.device().type() == DEV;
  if (inside || !self.numel() || !(down || up)) {
    begin();
    alias(dst).copy_(alias(self));
    return dst;
  }
  if (down) longest(self.numel() * self.itemsize());
  if (up) count("copies", "up");
  if (!non_blocking) {
    if (down) wait("copy");
    begin();
    alias(dst).copy_(alias(self));
    return dst;
  }
  begin();
  // What lies on the device is as it is now, in the order of operations; what lies on the host as it is then.
  Tensor from = down ? alias(self).clone() : self;
  std::lock_guard<std::mutex> g(queue);
  late.push_back({++launched, dst, from, up});
  return dst;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  if (dst.sizes() != self.sizes()) dst.resize_(self.sizes());
  alias(dst).copy_(alias(self));
  return dst;
}
at::Scalar scalar(const Tensor& self) { wait("item"); begin(); return at::_local_scalar_dense(alias(self)); }
Tensor as_strided(const Tensor& s, c10::IntArrayRef z, c10::IntArrayRef st, std::optional<int64_t> o) {
  return at::native::as_strided_tensorimpl(s, z, st, o); }
Tensor view(const Tensor& s, c10::IntArrayRef z) { return at::native::view(s, z); }
Tensor reshape_alias(const Tensor& s, c10::IntArrayRef z, c10::IntArrayRef st) { return at::native::_reshape_alias(s, z, st); }
Tensor unfold(const Tensor& s, int64_t d, int64_t n, int64_t st) { return at::native::unfold(s, d, n, st); }
const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat> f) {
  int64_t n = 1; for (auto s : size) n *= s;
  auto* impl = self.unsafeGetTensorImpl();
  size_t need = (n + self.storage_offset()) * self.itemsize();
  if (need > self.storage().nbytes()) Hooks().resizePrivateUse1Bytes(self.storage(), need);
  impl->set_sizes_contiguous(size);
  return self;
}
Tensor& set_source(Tensor& r, at::Storage s, int64_t o, c10::IntArrayRef z, c10::IntArrayRef st) {
  r.unsafeGetTensorImpl()->set_storage_keep_dtype(s);
  r.unsafeGetTensorImpl()->set_sizes_and_strides(z, st, o);
  return r;
}

bool is_bool_index(const c10::IValue& v) {
  auto mask = [](const Tensor& t) { return t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte); };
  for (const auto& i : v.toListRef()) if (i.isTensor() && mask(i.toTensor())) return true;
  return false;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name();
  const bool indexing = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" || name == "aten::index_put";
  auto arguments = torch::jit::last(*stack, schema.arguments().size());
  auto look = [&](const Tensor& t) {
    if (!t.defined() || t.device().type() == DEV || t.dim() == 0) return;
    count("mixed", name.substr(6));
    if (indexing) return;  // CUDA, too, takes indices from the host
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, pretend:0 and cpu! (", name, ")");
  };
  for (const auto& a : arguments) {
    if (a.isTensor()) look(a.toTensor());
    else if (a.isTensorList()) for (const Tensor& t : a.toTensorVector()) look(t);
    else if (a.isOptionalTensorList()) for (const std::optional<Tensor>& t : a.toOptionalTensorVector()) if (t) look(*t);
  }
  if (indexing && is_bool_index(arguments[1])) wait("mask index");
  for (const char* stops : {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
                            "aten::unique_consecutive", "aten::is_nonzero", "aten::_unique", "aten::bincount",
                            "aten::_linalg_eigh", "aten::_linalg_svd"})
    if (name == stops) wait(name.substr(6));
  if (name == "aten::repeat_interleave" && arguments.back().isNone()) wait("repeat_interleave");
  count("ops", name.substr(6));
  begin();
  inside++;
  try { at::native::cpu_fallback(op, stack); } catch (...) { inside--; throw; }
  inside--;
}

Tensor onto(const Tensor& cpu) {
  if (!cpu.defined()) return cpu;
  Tensor there = empty_strided(cpu.sizes(), cpu.strides(), cpu.scalar_type(), {}, {}, {});
  alias(there).copy_(cpu);
  return there;
}
Tensor conv(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, c10::SymIntArrayRef stride, c10::SymIntArrayRef pad,
            c10::SymIntArrayRef dil, bool transposed, c10::SymIntArrayRef outpad, c10::SymInt groups) {
  TORCH_CHECK(x.device() == w.device(), "conv: mixed devices");
  std::optional<Tensor> bias; if (b && b->defined()) bias = alias(*b);
  return onto(at::convolution_symint(alias(x), alias(w), bias, stride, pad, dil, transposed, outpad, groups));
}
std::tuple<Tensor, Tensor, Tensor> conv_back(const Tensor& gy, const Tensor& x, const Tensor& w, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef pad, c10::SymIntArrayRef dil, bool transposed, c10::SymIntArrayRef outpad, c10::SymInt groups, std::array<bool, 3> mask) {
  std::vector<c10::SymInt> bias_size{transposed ? w.sym_size(1) * groups : w.sym_size(0)};
  auto [a, b, c] = at::convolution_backward_symint(alias(gy), alias(x), alias(w), c10::SymIntArrayRef(bias_size), stride, pad, dil, transposed, outpad, groups, mask);
  return {onto(a), onto(b), onto(c)};
}

// Its schema does not say that it changes the running statistics: the fallback would change copies of them.
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& w, const std::optional<Tensor>& b,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& var, bool training, double momentum, double eps) {
  auto at_host = [&](const std::optional<Tensor>& t) -> std::optional<Tensor> {
    if (!t || !t->defined()) return std::nullopt;
    TORCH_CHECK(t->device() == x.device(), "batch_norm: mixed devices");
    return alias(*t);
  };
  count("ops", "native_batch_norm");
  begin();
  inside++;
  auto [y, m, v] = at::native_batch_norm(alias(x), at_host(w), at_host(b), at_host(mean), at_host(var), training, momentum, eps);
  inside--;
  return {onto(y), onto(m), onto(v)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &scalar);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("native_batch_norm", &batch_norm);
  m.impl("convolution_overrideable", &conv);
  m.impl("convolution_backward_overrideable", &conv_back);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_source);
}
}  // namespace

extern "C" {  // called over ctypes: no Python headers, which take long to compile
void pretend_hooks() { static Hooks* hooks = new Hooks(); at::RegisterPrivateUse1HooksInterface(hooks); }
void pretend_reset(int process) { std::lock_guard<std::mutex> g(lock); (process ? every : mine).clear(); }
void pretend_report(int process, char* out, int room) {
  std::lock_guard<std::mutex> g(lock);
  std::string text;
  for (auto& [name, n] : process ? every : mine) text += name + "\t" + std::to_string(n) + "\n";
  std::strncpy(out, text.c_str(), room - 1);
}
}
