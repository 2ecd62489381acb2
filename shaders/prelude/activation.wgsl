
// `act(gate) · up`, where `activation` is one of the host's numbers.
fn gated(activation: u32, gate: f32, up: f32) -> f32 {
    var x = gate;
    if (activation == RELU2) {
        let positive = max(gate, 0.0);
        x = positive * positive;
    } else if (activation == SILU) {
        x = gate / (1.0 + exp(-gate));
    } else {
        // tanh(y) = 1 − 2 / (exp(2y) + 1), which does not overflow to NaN; y's cube may be large.
        let y = 0.7978845608 * fma(0.044715 * gate * gate, gate, gate);
        x = 0.5 * gate * (2.0 - 2.0 / (exp(2.0 * clamp(y, -20.0, 20.0)) + 1.0));
    }
    return x * up;
}
