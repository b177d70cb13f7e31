#include "cuda/bindings.h"

#include "cuda/glu_depthwise_conv.h"

namespace py = pybind11;

namespace lcc {
namespace {

using Pointer = std::uintptr_t;  // of device memory; 0 is null

template <class T = void>
T* at(Pointer address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_cuda(py::module_& m) {
    using Op = GluDepthwiseConv;
    using namespace py::literals;
    py::enum_<Element>(m, "Element")
        .value("float32", Element::float32)
        .value("float16", Element::float16)
        .value("bfloat16", Element::bfloat16);

    py::class_<Op>(m, "GluDepthwiseConv", "Sizes, strides and inputs; see csrc/cuda/glu_depthwise_conv.h.")
        .def(py::init([](Element element, std::int64_t batch, std::int64_t frames, int channels, int width,
                         Pointer x, std::int64_t x_batch, std::int64_t x_frame, Pointer weight, Pointer bias,
                         Pointer lengths, Pointer scale, Pointer shift, int device, Pointer stream) {
                 return Op{element, batch, frames, channels, width, at(x), x_batch, x_frame, at(weight), at(bias),
                           at<const std::int64_t>(lengths), at<const float>(scale), at<const float>(shift), device, stream};
             }),
             py::kw_only(), "element"_a, "batch"_a, "frames"_a, "channels"_a, "width"_a, "x"_a, "x_batch"_a,
             "x_frame"_a, "weight"_a, "bias"_a, "lengths"_a, "scale"_a, "shift"_a, "device"_a, "stream"_a);

    m.def(
        "glu_depthwise_conv_forward",
        [](const Op& op, Pointer y, Pointer conv) { glu_depthwise_conv_forward(op, at(y), at(conv)); }, "op"_a,
        py::kw_only(), "y"_a, "conv"_a);
    m.def("glu_depthwise_conv_slots", &glu_depthwise_conv_slots, "batch"_a, "frames"_a, "channels"_a);
    m.def(
        "glu_depthwise_conv_backward",
        [](const Op& op, Pointer dy, std::int64_t dy_batch, std::int64_t dy_frame, Pointer conv, Pointer dx,
           Pointer dtaps, Pointer dbias, Pointer dshift, Pointer dscale, Pointer partial, int slots) {
            glu_depthwise_conv_backward(op, {at(dy), dy_batch, dy_frame, at(conv), at(dx), at(dtaps), at(dbias),
                                             at<float>(dshift), at<float>(dscale), at<float>(partial), slots});
        },
        "op"_a, py::kw_only(), "dy"_a, "dy_batch"_a, "dy_frame"_a, "conv"_a, "dx"_a, "dtaps"_a, "dbias"_a, "dshift"_a,
        "dscale"_a, "partial"_a, "slots"_a);
}

}  // namespace lcc
