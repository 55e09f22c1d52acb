//! The programs' clock. The kernel's count of timer interrupts ("jiffies", `bpf_jiffies64`, 5.6) costs them a load, where
//! `bpf_ktime_get_coarse_ns` costs a tenth of an established packet's time. How long a jiffy is, the coarse clock's resolution
//! tells; when the count began, one look at both.

use anyhow::{Context, Result, ensure};
use nix::time::ClockId;
use proxy_common::settings::Clock;

use super::sys::{Instruction, run_classifier};

/// How often the count may change while it is looked at.
const TRIES: u32 = 100;

/// How the programs tell the time; by the precise clock if the kernel can't be asked for its count.
pub fn clock() -> Clock {
    read().unwrap_or_else(|error| {
        tracing::debug!("the programs use the precise clock: {error:#}");
        Clock::PRECISE
    })
}

fn read() -> Result<Clock> {
    let coarse = ClockId::CLOCK_MONOTONIC_COARSE;
    let jiffy = nanoseconds(coarse.res()?)?;
    for _ in 0..TRIES {
        let before = jiffies()?;
        let now = nanoseconds(coarse.now()?)?;
        if jiffies()? == before {
            let jiffy = u32::try_from(jiffy).context("a jiffy of seconds")?;
            ensure!(jiffy > 0, "a jiffy of no time");
            return Ok(Clock::new(jiffy, now.wrapping_sub(before.wrapping_mul(jiffy.into()))));
        }
    }
    anyhow::bail!("the count of jiffies does not stand still for two looks")
}

fn nanoseconds(time: nix::sys::time::TimeSpec) -> Result<u64> {
    u64::try_from(std::time::Duration::from(time).as_nanos()).context("a time of centuries")
}

/// The kernel's count. A program tells half of it at a time.
fn jiffies() -> Result<u64> {
    for _ in 0..TRIES {
        let high = half(32)?;
        let low = half(0)?;
        if half(32)? == high {
            return Ok(u64::from(high) << 32 | u64::from(low));
        }
    }
    anyhow::bail!("the count of jiffies does not stand still for two looks")
}

/// The lower half of the count once it is shifted right by so many bits.
fn half(shift: i32) -> Result<u32> {
    const JIFFIES64: i32 = 118;
    let instruction = |code, immediate| Instruction { code, registers: 0, offset: 0, immediate };
    let program = [
        instruction(0x85, JIFFIES64),
        // Register 0 >>= shift.
        instruction(0x77, shift),
        instruction(0x95, 0),
    ];
    run_classifier(&program).context("the kernel does not tell its count of jiffies")
}
