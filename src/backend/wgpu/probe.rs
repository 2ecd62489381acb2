//! What wgpu does not say of a device and a small kernel finds out.

use std::time::Duration;

use super::fault::sentence;
use super::kernel::WORKGROUP;
use crate::caught::caught;

const SOURCE: &str = include_str!("../../../shaders/probe_subgroups.wgsl");

/// Long enough for a driver that compiles slowly.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether a workgroup's threads fill its subgroups in the order of their numbers, which WGSL leaves
/// to the driver and the reductions rely on. An `Err` says what is not so.
pub(super) fn subgroups_in_order(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<(), String> {
    // wgpu panics where a device is lost in the middle of a call.
    let answered = caught(|| pollster::block_on(ask(device, queue)));
    in_order(&answered.unwrap_or_else(|_| Err("the driver failed when it was asked".into()))?)
}

/// `lane` and `width` of each thread.
fn in_order(threads: &[[u32; 2]]) -> Result<(), String> {
    let width = threads.first().map_or(0, |&[_, width]| width);
    if !width.is_power_of_two() || width > WORKGROUP {
        return Err(format!("subgroups have {width} threads"));
    }
    for (index, &[lane, own]) in threads.iter().enumerate() {
        if own != width {
            return Err(format!("subgroups of one workgroup have {width} and {own} threads"));
        }
        if lane != index as u32 % width {
            return Err(format!(
                "thread {index} of a workgroup is number {lane} of its subgroup of {width}"
            ));
        }
    }
    Ok(())
}

async fn ask(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Vec<[u32; 2]>, String> {
    const BYTES: u64 = 8 * WORKGROUP as u64;
    let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("probe_subgroups"),
        source: wgpu::ShaderSource::Wgsl(SOURCE.into()),
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("probe_subgroups"),
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions {
            constants: &[("WORKGROUP", f64::from(WORKGROUP))],
            ..Default::default()
        },
        cache: None,
    });
    let buffer = |usage| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("probe_subgroups"),
            size: BYTES,
            usage,
            mapped_at_creation: false,
        })
    };
    let found = buffer(wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
    let readable = buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some("probe_subgroups"),
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[wgpu::BindGroupEntry { binding: 0, resource: found.as_entire_binding() }],
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    pass.set_pipeline(&pipeline);
    pass.set_bind_group(0, &group, &[]);
    pass.dispatch_workgroups(1, 1, 1);
    drop(pass);
    encoder.copy_buffer_to_buffer(&found, 0, &readable, 0, Some(BYTES));
    let index = queue.submit([encoder.finish()]);
    readable.map_async(wgpu::MapMode::Read, .., |_| {});
    if let Some(error) = scope.pop().await {
        return Err(sentence(&error));
    }
    let wait = wgpu::PollType::Wait { submission_index: Some(index), timeout: Some(PATIENCE) };
    device.poll(wait).map_err(|error| error.to_string())?;
    let view = readable.slice(..).get_mapped_range().map_err(|error| error.to_string())?;
    Ok(bytemuck::pod_collect_to_vec(&view[..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threads(width: u32) -> Vec<[u32; 2]> {
        (0..WORKGROUP).map(|index| [index % width, width]).collect()
    }

    #[test]
    fn only_one_order_is_the_right_one() {
        for width in [1, 4, 8, 32, 64, 128, 256] {
            assert_eq!(in_order(&threads(width)), Ok(()));
        }
        let refused = |spoil: fn(&mut Vec<[u32; 2]>)| {
            let mut threads = threads(32);
            spoil(&mut threads);
            in_order(&threads).expect_err("something is wrong")
        };
        let swapped = refused(|threads| threads.swap(40, 41));
        assert_eq!(swapped, "thread 40 of a workgroup is number 9 of its subgroup of 32");
        let mixed = refused(|threads| threads[200][1] = 16);
        assert_eq!(mixed, "subgroups of one workgroup have 32 and 16 threads");
        let odd = refused(|threads| threads.fill([0, 24]));
        assert_eq!(odd, "subgroups have 24 threads");
        assert!(in_order(&[]).is_err());
        assert!(in_order(&[[0, 512]]).is_err());
        assert!(in_order(&[[0, 0]]).is_err(), "a kernel that did not run");
    }
}
