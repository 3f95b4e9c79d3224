"""One layer of V4: attention, then experts, each between hyper-connections (V4 report 2.2)."""

from __future__ import annotations

from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from posttrain.backbone import decode_hyper
from posttrain.backbone.attention import Context, V4Attention
from posttrain.backbone.auxiliary import touch
from posttrain.backbone.decode import DecodeContext, decode_attention
from posttrain.backbone.decode_norm import normed
from posttrain.backbone.experts import V4SparseMoeBlock
from posttrain.backbone.hyper_connections import V4HyperConnection
from posttrain.backbone.norm import V4RMSNorm


class V4DecoderLayer(stock.DeepseekV4DecoderLayer):
    """Attention, then experts, each between hyper-connections (V4 report 2.2)."""

    def __init__(self, config: DeepseekV4Config, layer_idx: int) -> None:
        super(stock.DeepseekV4DecoderLayer, self).__init__()
        self.layer_idx = layer_idx
        self.self_attn = V4Attention(config, layer_idx)
        self.mlp = V4SparseMoeBlock(config, layer_idx)
        self.input_layernorm = V4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = V4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn_hc = V4HyperConnection(config)
        self.ffn_hc = V4HyperConnection(config)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_TNH: Tensor, token_id_T: Tensor, context: Context | DecodeContext
    ) -> Tensor:
        """Streams (T, N, H) -> (T, N, H)."""
        if isinstance(context, DecodeContext):
            return self._step(x_TNH, token_id_T, context)
        collapsed, write = self.attn_hc(x_TNH)
        x_TNH = write(self.self_attn(self.input_layernorm(collapsed), context))
        collapsed, write = self.ffn_hc(x_TNH)
        x_TNH = write(self.mlp(self.post_attention_layernorm(collapsed), token_id_T, context))
        return x_TNH if len(x_TNH) else touch(x_TNH, self.parameters())

    def _step(self, x_TNH: Tensor, token_id_T: Tensor, context: DecodeContext) -> Tensor:
        """The same of one token a slot."""
        collapsed, write = decode_hyper.connect(self.attn_hc, x_TNH)
        normed_TH = normed(self.input_layernorm, collapsed)
        x_TNH = write(decode_attention(self.self_attn, normed_TH, context))
        collapsed, write = decode_hyper.connect(self.ffn_hc, x_TNH)
        normed_TH = normed(self.post_attention_layernorm, collapsed)
        return write(self.mlp(normed_TH, token_id_T, context))
