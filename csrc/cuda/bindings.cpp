#include "cuda/bindings.h"

#include "arguments.h"
#include "cuda/glu_depthwise_conv.h"
#include "cuda/relpos_attention.h"

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

void bind_glu_depthwise_conv(py::module_& m) {
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

void bind_relpos_attention(py::module_& m) {
    Arguments<RelposHeads>(m, "RelposHeads", "Rows of heads by utterance, frame and head")
        .required<&RelposHeads::data>("data")
        .required<&RelposHeads::batch_stride>("batch_stride")
        .required<&RelposHeads::frame_stride>("frame_stride")
        .required<&RelposHeads::head_stride>("head_stride");

    using Forward = RelposAttentionForward;
    Arguments<Forward>(m, "RelposAttentionForward", "Arguments of relpos_attention_forward")
        .required<&Forward::element>("element")
        .required<&Forward::batch>("batch")
        .required<&Forward::frames>("frames")
        .required<&Forward::total_frames>("total_frames")
        .required<&Forward::heads>("heads")
        .required<&Forward::head_dim>("head_dim")
        .required<&Forward::q>("q")
        .required<&Forward::k>("k")
        .required<&Forward::v>("v")
        .required<&Forward::pos>("pos")
        .required<&Forward::u>("u")
        .required<&Forward::v_bias>("v_bias")
        .optional<&Forward::lengths>("lengths")
        .optional<&Forward::cu_seqlens>("cu_seqlens")
        .optional<&Forward::seed>("seed")
        .required<&Forward::dropout_p>("dropout_p")
        .required<&Forward::out>("out")
        .required<&Forward::lse>("lse")
        .required<&Forward::device>("device")
        .required<&Forward::stream>("stream");
    bind_launch<Forward>(m, "relpos_attention_forward", &relpos_attention_forward);
}

}  // namespace

void bind(py::module_& m) {
    bind_glu_depthwise_conv(m);
    bind_relpos_attention(m);
}

}  // namespace lcc::cuda
