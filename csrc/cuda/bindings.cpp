#include "cuda/bindings.h"

#include "arguments.h"
#include "cuda/glu_depthwise_conv.h"

namespace lcc::cuda {
namespace {

template <class S>
void add_glu_depthwise_conv(Arguments<S>& args) {
    args.template required<&S::element>("element")
        .template required<&S::batch>("batch")
        .template required<&S::frames>("frames")
        .template required<&S::channels>("channels")
        .template required<&S::width>("width")
        .template required<&S::x>("x")
        .template required<&S::x_batch_stride>("x_batch_stride")
        .template required<&S::x_frame_stride>("x_frame_stride")
        .template required<&S::weight>("weight")
        .template optional<&S::lengths>("lengths")
        .template optional<&S::scale>("scale")
        .template optional<&S::shift>("shift")
        .template optional<&S::layer_norm>("layer_norm")
        .template optional<&S::eps>("eps")
        .template required<&S::device>("device")
        .template required<&S::stream>("stream");
}

}  // namespace

void bind(py::module_& m) {
    using Forward = GluDepthwiseConvForward;
    Arguments<Forward> forward(m, "GluDepthwiseConvForward", "Arguments of glu_depthwise_conv_forward");
    add_glu_depthwise_conv(forward);
    forward.optional<&Forward::bias>("bias").required<&Forward::out>("out").optional<&Forward::y>("y");

    using Backward = GluDepthwiseConvBackward;
    Arguments<Backward> backward(m, "GluDepthwiseConvBackward", "Arguments of glu_depthwise_conv_backward");
    add_glu_depthwise_conv(backward);
    backward.required<&Backward::dout>("dout")
        .required<&Backward::dout_batch_stride>("dout_batch_stride")
        .required<&Backward::dout_frame_stride>("dout_frame_stride")
        .required<&Backward::y>("y")
        .required<&Backward::dx>("dx")
        .required<&Backward::dtaps>("dtaps")
        .required<&Backward::dbias>("dbias")
        .required<&Backward::dshift>("dshift")
        .required<&Backward::dscale>("dscale")
        .required<&Backward::partial>("partial")
        .required<&Backward::slots>("slots")
        .optional<&Backward::rows>("rows");

    bind_launch<Forward>(m, "glu_depthwise_conv_forward", &glu_depthwise_conv_forward);
    bind_launch<Backward>(m, "glu_depthwise_conv_backward", &glu_depthwise_conv_backward);
    m.def("glu_depthwise_conv_slots", &glu_depthwise_conv_slots, py::arg("batch"), py::arg("frames"),
          py::arg("channels"));
}

}  // namespace lcc::cuda
