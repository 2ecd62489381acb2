
struct Thread {
    @builtin(local_invocation_index) index: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    // Read, never assumed: 4 to 128.
    @builtin(subgroup_size) width: u32,
}

fn subgroup_width(thread: Thread) -> u32 {
    return thread.width;
}

// Neighbours first, then neighbouring pairs, and so on: the tree that workgroup memory goes on
// with, so that the width does not change a bit. `subgroupAdd` adds in an order of its own.
fn subgroup_sum_f32(x: f32, thread: Thread) -> f32 {
    var sum = x;
    for (var distance = 1u; distance < thread.width; distance <<= 1u) {
        sum += subgroupShuffleXor(sum, distance);
    }
    return sum;
}

fn subgroup_sum_i32(x: i32, thread: Thread) -> i32 {
    return subgroupAdd(x);
}

fn subgroup_max_u32(x: u32, thread: Thread) -> u32 {
    return subgroupMax(x);
}
