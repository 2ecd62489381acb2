
// What every shader starts with, after the numbers that it shares with the host: `kernel::NUMBERS`.

// The bits of a NaN. Floats that are meant to be NaN are stored as these bits.
const NAN_BITS = 0x7fc00000u;
// Magnitudes from here on are infinite or NaN. WGSL lets a compiler assume that neither occurs, so
// bits are compared, not floats.
const INFINITE_BITS = 0x7f800000u;

fn magnitude_bits(x: f32) -> u32 {
    return bitcast<u32>(x) & 0x7fffffffu;
}

// The number of a workgroup in a grid that was folded into two dimensions; `wgpu::grid`.
fn flat_group(thread: Thread) -> u32 {
    return thread.group.y * thread.groups.x + thread.group.x;
}
