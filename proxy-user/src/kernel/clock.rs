//! The programs' clock. The kernel's count of timer interrupts ("jiffies", `bpf_jiffies64`, 5.6) costs them a load, where
//! `bpf_ktime_get_coarse_ns` costs a tenth of an established packet's time. How long a jiffy is, the coarse clock's resolution
//! tells; when the count began, one look at both.

use anyhow::{Context, Result, ensure};
use nix::time::ClockId;
use proxy_common::settings::Clock;

use super::sys::{Classifier, Instruction};

/// How often the count may change while it is looked at.
const TRIES: u32 = 100;

/// How the programs tell the time; by the precise clock if the kernel can't be asked for its count.
pub fn clock() -> Clock {
    read().unwrap_or_else(|error| {
        tracing::warn!("the programs use the precise clock, which costs them more: {error:#}");
        Clock::PRECISE
    })
}

fn read() -> Result<Clock> {
    let coarse = ClockId::CLOCK_MONOTONIC_COARSE;
    let jiffy = u32::try_from(nanoseconds(coarse.res()?)?).context("a jiffy of seconds")?;
    ensure!(jiffy > 0, "a jiffy of no time");
    let count = Jiffies::open().context("the kernel does not tell its count of jiffies")?;
    for _ in 0..TRIES {
        let before = count.read()?;
        let now = nanoseconds(coarse.now()?)?;
        if count.read()? == before {
            return Ok(Clock::new(jiffy, now.wrapping_sub(before.wrapping_mul(jiffy.into()))));
        }
    }
    anyhow::bail!("the count of jiffies does not stand still for two looks")
}

fn nanoseconds(time: nix::sys::time::TimeSpec) -> Result<u64> {
    u64::try_from(std::time::Duration::from(time).as_nanos()).context("a time of centuries")
}

/// The kernel's count. A program tells a half of it: all that a program returns.
struct Jiffies {
    low: Classifier,
    high: Classifier,
}

impl Jiffies {
    fn open() -> Result<Self> {
        const JIFFIES64: i32 = 118;
        let half = |shift| {
            let instruction =
                |code, immediate| Instruction { code, registers: 0, offset: 0, immediate };
            // Call; register 0 >>= shift; exit.
            let [call, shifted, exit] = [(0x85, JIFFIES64), (0x77, shift), (0x95, 0)];
            Classifier::load(&[call, shifted, exit].map(|(code, value)| instruction(code, value)))
        };
        Ok(Self { low: half(0)?, high: half(32)? })
    }

    fn read(&self) -> Result<u64> {
        for _ in 0..TRIES {
            let (high, low) = (self.high.run()?, self.low.run()?);
            if self.high.run()? == high {
                return Ok(u64::from(high) << 32 | u64::from(low));
            }
        }
        anyhow::bail!("the upper half of the count of jiffies does not stand still")
    }
}
