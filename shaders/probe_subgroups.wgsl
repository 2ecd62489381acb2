// What each thread of a workgroup is within its subgroup, for `probe.rs`.

override WORKGROUP: u32;

@group(0) @binding(0) var<storage, read_write> found: array<vec2<u32>>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) width: u32,
) {
    found[index] = vec2<u32>(lane, width);
}
