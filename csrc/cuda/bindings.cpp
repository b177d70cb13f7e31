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

template <class S>
void add_relpos_attention(Arguments<S>& args) {
    args.template required<&S::element>("element")
        .template required<&S::batch>("batch")
        .template required<&S::frames>("frames")
        .template required<&S::total_frames>("total_frames")
        .template required<&S::heads>("heads")
        .template required<&S::head_dim>("head_dim")
        .template required<&S::q>("q")
        .template required<&S::k>("k")
        .template required<&S::v>("v")
        .template required<&S::pos>("pos")
        .template required<&S::u>("u")
        .template required<&S::v_bias>("v_bias")
        .template optional<&S::lengths>("lengths")
        .template optional<&S::cu_seqlens>("cu_seqlens")
        .template optional<&S::seed>("seed")
        .template required<&S::dropout_p>("dropout_p")
        .template required<&S::device>("device")
        .template required<&S::stream>("stream");
}

void bind_relpos_attention(py::module_& m) {
    Arguments<RelposHeads>(m, "RelposHeads", "Rows of heads by utterance, frame and head")
        .required<&RelposHeads::data>("data")
        .required<&RelposHeads::batch_stride>("batch_stride")
        .required<&RelposHeads::frame_stride>("frame_stride")
        .required<&RelposHeads::head_stride>("head_stride");

    using Forward = RelposAttentionForward;
    Arguments<Forward> forward(m, "RelposAttentionForward", "Arguments of relpos_attention_forward");
    add_relpos_attention(forward);
    forward.required<&Forward::out>("out").required<&Forward::lse>("lse");

    using Backward = RelposAttentionBackward;
    Arguments<Backward> backward(m, "RelposAttentionBackward", "Arguments of relpos_attention_backward");
    add_relpos_attention(backward);
    backward.required<&Backward::out>("out")
        .required<&Backward::lse>("lse")
        .required<&Backward::dout>("dout")
        .required<&Backward::dq>("dq")
        .required<&Backward::dk>("dk")
        .required<&Backward::dv>("dv")
        .required<&Backward::dpos>("dpos")
        .required<&Backward::du>("du")
        .required<&Backward::dv_bias>("dv_bias")
        .required<&Backward::scratch>("scratch")
        .required<&Backward::slots>("slots")
        .required<&Backward::parts>("parts");

    bind_launch<Forward>(m, "relpos_attention_forward", &relpos_attention_forward);
    bind_launch<Backward>(m, "relpos_attention_backward", &relpos_attention_backward);
    m.def("relpos_attention_slots", &relpos_attention_slots, py::arg("batch"), py::arg("frames"), py::arg("heads"),
          py::arg("head_dim"));
    m.def("relpos_attention_parts", &relpos_attention_parts, py::arg("slots"), py::arg("frames"), py::arg("heads"));
    m.def("relpos_attention_scratch", &relpos_attention_scratch, py::arg("frames"), py::arg("head_dim"));
}

}  // namespace

void bind(py::module_& m) {
    bind_glu_depthwise_conv(m);
    bind_relpos_attention(m);
}

}  // namespace lcc::cuda
