
struct Thread {
    @builtin(local_invocation_index) index: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
}

// Without subgroups, each thread is one.
fn subgroup_width(thread: Thread) -> u32 {
    return 1u;
}

fn subgroup_sum_f32(x: f32, thread: Thread) -> f32 {
    return x;
}

fn subgroup_sum_i32(x: i32, thread: Thread) -> i32 {
    return x;
}

fn subgroup_max_u32(x: u32, thread: Thread) -> u32 {
    return x;
}
